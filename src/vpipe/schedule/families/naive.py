"""Naive model parallelism: one microbatch after the other, one rank at work at a time.

Idea: what a model cut over devices does without any pipelining. Each microbatch goes forward through all stages and
backward through all of them before the next one starts; one update at the end of the batch. The baseline that every
other schedule is measured against.

Closed form: bubble fraction ``1 - 1/p``, makespan ``m p (F + B)``, one microbatch held.

Source: the starting point of GPipe (Huang et al., NeurIPS 2019), figure 2b.
"""

from __future__ import annotations

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule, freeze

__all__ = ["build_naive"]


def build_naive(num_ranks: int, num_microbatches: int, *, stages_per_rank: int = 1) -> Schedule:
    """Build the schedule without overlap; any number of stages per rank, in a loop."""
    placement = Placement(num_ranks, stages_per_rank)
    orders = []
    for rank in range(num_ranks):
        stages = placement.stages_of(rank)
        order = []
        for microbatch in range(num_microbatches):
            order += [Action(stage, Kind.F, microbatch) for stage in stages]
            order += [Action(stage, Kind.B, microbatch) for stage in reversed(stages)]
        order += [Action(stage, Kind.STEP, num_microbatches - 1) for stage in reversed(stages)]
        orders.append(order)
    return Schedule("naive", num_microbatches, placement, freeze(orders))
