"""The file that -o names: one of the same kind may be written over, anything else is the user's and stays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from vpipe.errors import ConfigError

__all__ = ["validate_output"]

_KEYS = {"plan": ("schedule", "partition"), "profile": ("format", "sizes")}
"""What files of each kind have, in every version."""


def validate_output(path: Path | None, kind: Literal["plan", "profile"]) -> None:
    """Refuse to write a `kind` over a file of another one; to be called before the work that leads to it.

    Raises:
        ConfigError: there is such a file, or a folder.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"-o {path} is a folder; give the name of a file, e.g. -o {path / kind}.json")
    if path.is_file() and path.stat().st_size and not _is(kind, path):
        raise ConfigError(
            f"-o {path} exists and is no {kind}, so it is not written over; give another name, or remove it first"
        )


def _is(kind: str, path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return False
    return isinstance(content, Mapping) and all(key in content for key in _KEYS[kind])
