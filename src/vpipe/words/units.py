"""Bytes as people write and read them."""

from __future__ import annotations

import math
import re

from vpipe.errors import PlanError

__all__ = ["format_bytes", "parse_bytes"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_FACTORS: dict[str, int] = {unit: 1024**power for power, unit in enumerate(_UNITS)} | {
    unit: 1000**power for power, unit in enumerate(("", "kB", "MB", "GB", "TB"))
}
_FORM = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str) -> int:
    """Read a size such as ``4GiB``, ``512 MiB``, ``1.5GB`` or ``1000``; what is less than a byte is cut off.

    Raises:
        PlanError: it is no size.
    """
    match = _FORM.fullmatch(text)
    factors = {unit.lower(): factor for unit, factor in _FACTORS.items()}
    if match is None or match[2].lower() not in factors:
        raise PlanError(f"'{text}' is no size; write a number and a unit, e.g. 4GiB, 512MiB, 1.5GB, or bytes")
    return math.floor(float(match[1]) * factors[match[2].lower()])


def format_bytes(num_bytes: float) -> str:
    """Write a size with three digits or so."""
    power = 0
    while num_bytes >= 999.5 and power < len(_UNITS) - 1:
        num_bytes /= 1024
        power += 1
    return f"{num_bytes:.0f} {_UNITS[power]}" if power == 0 else f"{num_bytes:.3g} {_UNITS[power]}"
