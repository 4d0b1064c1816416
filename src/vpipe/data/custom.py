"""The user's own data: a function named in the run's YAML makes the source."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from vpipe.data.bert_meta import Split
from vpipe.data.source import ArraySource, BatchSource
from vpipe.errors import ConfigError, DataError

__all__ = ["load_entry", "open_source"]


def open_source(
    entry: str, split: Split = "train", *, options: Mapping[str, Any] | None = None, base: Path | None = None
) -> BatchSource | None:
    """Call the function `entry` as `function(split, **options)` and return the source that it gives.

    `entry` is 'file.py:function', relative to `base`, or 'package.module:function'. The function returns a
    `BatchSource`, or a dictionary of arrays or tensors by field with samples along the first dimension; for
    `split='eval'` it may return None, which means that there is nothing to evaluate on. Errors raised inside the
    function are not caught.

    Raises:
        ConfigError: the function cannot be found, or does not take these options.
        DataError: what it returns is no source.
    """
    function = load_entry(entry, base)
    options = dict(options or {})
    try:
        inspect.signature(function).bind(split, **options)
    except TypeError as error:
        raise ConfigError(
            f"data.entry: {entry} cannot be called as function(split, **options) with options "
            f"{', '.join(options) or 'none'}: {error}; correct data.options or the function's parameters"
        ) from error
    made = function(split, **options)
    if isinstance(made, Mapping):
        return ArraySource(made)
    if made is None and split == "eval":
        return None
    if not isinstance(made, BatchSource):
        raise DataError(
            f"data.entry: {entry} returned {type(made).__name__} for split '{split}'; return a BatchSource "
            f"(fields, num_samples, batch) or a dictionary of arrays by field"
        )
    return made


def load_entry(entry: str, base: Path | None = None, key: str = "data.entry") -> Callable[..., Any]:
    """Import the function that 'file.py:function' or 'package.module:function' names.

    A file is imported once, and may import the modules beside it.

    Raises:
        ConfigError: no such file, module or function; the message names `key`.
    """
    place, separator, name = entry.rpartition(":")
    if not separator or not place or not name.isidentifier():
        raise ConfigError(f"{key}: '{entry}' is not of the form 'file.py:function' or 'package.module:function'")
    module = _load_file((base or Path()) / place, key) if place.endswith(".py") else _load_module(place, key)
    function = getattr(module, name, None)
    if not callable(function):
        known = [known for known, value in vars(module).items() if _is_own_function(value, module)]
        raise ConfigError(f"{key}: {place} has no function '{name}'; it has {', '.join(known) or 'no functions'}")
    return function  # type: ignore[no-any-return]


def _is_own_function(value: object, module: ModuleType) -> bool:
    return inspect.isfunction(value) and value.__module__ == module.__name__ and not value.__name__.startswith("_")


def _load_file(path: Path, key: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{key}: there is no file {path}; paths are relative to the run's YAML file")
    path = path.resolve()
    name = f"vpipe_entry:{path}"  # no other module can have this name, whatever the file is called
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a name that ends in .py always has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is executed
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_module(name: str, key: str) -> ModuleType:
    try:
        found = importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        found = False
    if not found:
        raise ConfigError(f"{key}: there is no module '{name}'; install it, set PYTHONPATH, or give 'file.py:function'")
    return importlib.import_module(name)
