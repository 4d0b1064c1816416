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

from vpipe.errors import ModelError

__all__ = ["load_entry"]


def load_entry(entry: str, directory: Path | str = ".") -> Callable[..., Any]:
    """Import the function that `entry` names; a relative file is looked for in `directory`.

    Raises:
        ModelError: the text has another form, there is no such file, module or function, or importing it fails.
    """
    place, separator, name = entry.rpartition(":")
    if not separator or not place or not name.isidentifier():
        raise ModelError(f"'{entry}' is no entry; write 'file.py:function' or 'package.module:function'")
    module = _import_file(entry, Path(directory, place)) if place.endswith(".py") else _import_module(entry, place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        what = f"has no function '{name}'" if function is None else f"has '{name}', which is no function"
        raise ModelError(f"'{place}' {what}; it has {', '.join(known) or 'none'}")
    result: Callable[..., Any] = function
    return result


def _import_file(entry: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"'{entry}' names the file '{path}', which does not exist")
    # Two files of one name stay apart, and one file is imported once.
    name = f"_vpipe_entry_{path.stem}_{hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        del sys.modules[name]
        raise ModelError(f"importing '{path}' failed: {type(error).__name__}: {error}") from error
    return module


def _import_module(entry: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ModelError(
                f"'{entry}' names the module '{name}', which is not installed; for a file write its path with '.py'"
            ) from error
        raise ModelError(f"importing '{name}' failed: {error}") from error
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"importing '{name}' failed: {type(error).__name__}: {error}") from error
