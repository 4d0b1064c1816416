"""How many microbatches' activations a rank holds at once, by replaying its order."""

from __future__ import annotations

from collections.abc import Iterable

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.schedule import Schedule

__all__ = ["peak_activations", "stage_activations"]


def peak_activations(schedule: Schedule) -> tuple[float, ...]:
    """Return the largest number of microbatches each rank holds, in whole-rank units.

    A microbatch is held from its forward until its backward, or until its weight gradient when the backward is split;
    on a rank of v stages, one stage's microbatch counts 1/v.
    """
    stages_per_rank = schedule.placement.stages_per_rank
    return tuple(_peak(order) / stages_per_rank for order in schedule.orders)


def stage_activations(schedule: Schedule) -> tuple[int, ...]:
    """Return the largest number of microbatches that each stage holds, as `peak_activations` counts them."""
    return tuple(_peak(schedule.stage_order(stage)) for stage in range(schedule.num_stages))


def _peak(order: Iterable[Action]) -> int:
    held = peak = 0
    for action in order:
        if action.kind is Kind.F:
            held += 1
            peak = max(peak, held)
        elif action.kind in (Kind.B, Kind.W):
            held -= 1
    return peak
