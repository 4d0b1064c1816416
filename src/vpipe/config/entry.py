"""Functions of the user's own, named in a config as 'file.py:function' or 'package.module:function'."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from vpipe.errors import ConfigError

__all__ = ["load_entry"]


def load_entry(key: str, entry: str, directory: Path | str = ".") -> Callable[..., Any]:
    """Import the function that `entry`, the value of `key`, names; a relative file is looked for in `directory`.

    A file is imported once, and may import the modules beside it.

    Raises:
        ConfigError: the text has another form, there is no such file, module or function, or importing it fails.
    """
    place, separator, name = entry.rpartition(":")
    if not separator or not place or not name.isidentifier():
        raise ConfigError(f"{key}: '{entry}' is no entry; write 'file.py:function' or 'package.module:function'")
    path = Path(directory, place)
    module = _import_file(key, entry, path) if place.endswith(".py") else _import_module(key, entry, place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [name for name, value in vars(module).items() if _is_own(value, module) and not name.startswith("_")]
        what = f"has no function '{name}'" if function is None else f"has '{name}', which is no function"
        raise ConfigError(f"{key}: '{place}' {what}; it has {', '.join(known) or 'none'}")
    result: Callable[..., Any] = function
    return result


def _is_own(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _import_file(key: str, entry: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{key}: '{entry}' names the file '{path}', which does not exist")
    # Two files of one name stay apart, and one file is imported once.
    name = f"_vpipe_entry_{path.stem}_{hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))
    # Dataclasses and pickle look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        del sys.modules[name]
        raise ConfigError(f"{key}: importing '{path}' failed: {type(error).__name__}: {error}") from error
    return module


def _import_module(key: str, entry: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{key}: '{entry}' names the module '{name}', which is not installed; "
                "for a file write its path with '.py'"
            ) from error
        raise ConfigError(f"{key}: importing '{name}' failed: {error}") from error
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"{key}: importing '{name}' failed: {type(error).__name__}: {error}") from error
