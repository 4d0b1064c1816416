"""Names that were nearly right, and counts with their nouns."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean", "nearest", "plural"]


def nearest(word: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that is most like `word`, whatever its capitals, or None where none is like it."""
    names = {name.lower(): name for name in reversed(list(known))}
    close = difflib.get_close_matches(str(word).lower(), list(reversed(names)), n=1, cutoff=cutoff)
    return names[close[0]] if close else None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known name that is most like `word`, or nothing where none is."""
    near = nearest(word, known)
    return "" if near is None else f"; did you mean '{near}'?"


def plural(number: int, one: str, many: str) -> str:
    """Return the number with its noun."""
    return f"{number} {one if number == 1 else many}"
