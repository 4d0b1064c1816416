"""GPipe: all forwards of the batch, then all its backwards, then one update.

Idea: microbatches fill the pipeline, and the update waits until it is empty, so the result is that of one process.
Backwards run in ascending microbatch order on every stage (the paper draws them descending): the bubble is the same,
and gradients accumulate in microbatch order, which is what makes every schedule's sums bitwise equal.

Closed form: idle ``(p - 1)(F + B)`` per rank, bubble fraction ``(p - 1)/(m + p - 1)`` with equal stages; every rank
holds all m microbatches (recomputation is what makes that bearable).

Source: Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", NeurIPS 2019.
"""

from __future__ import annotations

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule, freeze

__all__ = ["build_gpipe"]


def build_gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """Build the schedule of all forwards, then all backwards."""
    orders = [
        [
            *(Action(stage, Kind.F, microbatch) for microbatch in range(num_microbatches)),
            *(Action(stage, Kind.B, microbatch) for microbatch in range(num_microbatches)),
            Action(stage, Kind.STEP, num_microbatches - 1),
        ]
        for stage in range(num_ranks)
    ]
    return Schedule("gpipe", num_microbatches, Placement(num_ranks), freeze(orders))
