"""Looped breadth-first: GPipe with several stages on each rank.

Idea: rank r holds the stages r, r + p, r + 2p, ... and takes all microbatches through its first stage, then all through
its second, ...; backwards likewise, last stage first. Filling and draining cost a v-th of GPipe's. All microbatches of
a stage are neighbours in time, so replicas can sum a stage's gradients, or fetch its sharded weights, once per batch.
Backwards run in microbatch order (the paper's run last to first), as the sums' order asks for.

Closed form: idle ``(p - 1)(F + B)/v`` per rank for m >= p; every rank holds all m microbatches.

Source: Lamy-Poirier, "Breadth-First Pipeline Parallelism", MLSys 2023.
"""

from __future__ import annotations

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule, freeze

__all__ = ["build_looped_bfs"]


def build_looped_bfs(num_ranks: int, num_microbatches: int, *, stages_per_rank: int = 2) -> Schedule:
    """Build all forwards stage by stage, then all backwards; with one stage per rank it is GPipe."""
    placement = Placement(num_ranks, stages_per_rank)
    orders = []
    for rank in range(num_ranks):
        stages = placement.stages_of(rank)
        batch = range(num_microbatches)
        order = [Action(stage, Kind.F, microbatch) for stage in stages for microbatch in batch]
        order += [Action(stage, Kind.B, microbatch) for stage in reversed(stages) for microbatch in batch]
        order += [Action(stage, Kind.STEP, num_microbatches - 1) for stage in reversed(stages)]
        orders.append(order)
    return Schedule("looped-bfs", num_microbatches, placement, freeze(orders))
