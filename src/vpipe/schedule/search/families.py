"""The hand-made families that fit a memory limit: what a search starts from, and what it has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vpipe.errors import ScheduleError
from vpipe.schedule.families.catalogue import SYNCHRONOUS
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.schedule import Schedule

__all__ = ["Family", "fits", "fitting_families"]


class Family(NamedTuple):
    """A hand-made schedule under its name in the registry."""

    name: str
    schedule: Schedule


def fits(schedule: Schedule, limits: Sequence[float]) -> bool:
    """Return whether no rank holds more microbatches than its limit, in whole-rank units."""
    return all(peak <= limit + 1e-9 for peak, limit in zip(peak_activations(schedule), limits, strict=True))


def fitting_families(
    num_ranks: int, num_microbatches: int, limits: Sequence[float], stages_per_rank: int | None
) -> list[Family]:
    """Build every synchronous family, with one and two stages per rank or as many as asked for, and keep what fits.

    At least `naive` is there: it holds one microbatch.
    """
    found = []
    for name, entry in SYNCHRONOUS.items():
        for count in (1, 2) if stages_per_rank is None else (stages_per_rank,):
            several = {"stages_per_rank": count} if "stages_per_rank" in entry.parameters else {}
            if count > 1 and not several:
                continue
            try:
                schedule = entry.builder(num_ranks, num_microbatches, **several)
            except ScheduleError:
                continue  # not with so many stages, or not at this size
            if fits(schedule, limits):
                found.append(Family(name, schedule))
    return found
