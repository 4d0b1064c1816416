"""How long work reports what it does, without printing."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "no_progress"]


class Progress(Protocol):
    """Called as work goes on: `step` names what is done, `done` of `total` units are ready (0 of 0: not countable)."""

    def __call__(self, step: str, done: int, total: int) -> None:
        """Take note."""


def no_progress(step: str, done: int, total: int) -> None:
    """Ignore the report."""
