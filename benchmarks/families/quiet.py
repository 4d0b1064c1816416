"""Measure while nobody else computes: an emulated device sleeps, but the runtime around it needs a core to wake on."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["NOISE", "quietly"]

T = TypeVar("T")

NOISE = 0.08
"""Share of the machine's processor time that other programs may take during a measurement."""
_TICKS = os.sysconf("SC_CLK_TCK")


def quietly(measure: Callable[[], T], end: float) -> T | None:
    """Measure until other programs left the machine alone meanwhile; None when `end` (monotonic) comes first."""
    while time.monotonic() < end:
        start, busy = time.monotonic(), _busy_seconds()
        found = measure()
        elapsed = time.monotonic() - start
        share = (_busy_seconds() - busy) / (elapsed * (os.cpu_count() or 1))
        if share <= NOISE:
            return found
        print(f"  other programs took {share:.0%} of the processor meanwhile: again", flush=True)
    return None


def _busy_seconds() -> float:
    """Return the processor time that was spent on this machine so far, but for this program and its ended children."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    user, nice, system, _, _, interrupt, soft, stolen = fields
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own_seconds = sum(usage.ru_utime + usage.ru_stime for usage in own)
    return (user + nice + system + interrupt + soft + stolen) / _TICKS - own_seconds
