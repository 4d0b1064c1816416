"""How much torch's C++ side writes to standard error."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

__all__ = ["errors_only"]

_WARNING, _ERROR = 1, 2


@contextmanager
def errors_only() -> Iterator[None]:
    """Keep torch's C++ warnings to itself, unless the environment asks for more than warnings.

    Where torch has no level that can be set while it runs, nothing changes.
    """
    level = _level()
    if level is None or level.value != _WARNING:
        yield
        return
    level.value = _ERROR
    try:
        yield
    finally:
        level.value = _WARNING


@cache
def _level() -> ctypes.c_int | None:
    """Return torch's own variable, which `TORCH_CPP_LOG_LEVEL` is read into when torch is imported."""
    for library in (Path(torch.__file__).parent / "lib").glob("*c10.*"):
        try:
            return ctypes.c_int.in_dll(ctypes.CDLL(str(library)), "FLAGS_caffe2_log_level")
        except (OSError, ValueError):
            continue
    return None
