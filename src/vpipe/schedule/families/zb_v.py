"""ZB-V: zero bubble with the memory of 1F1B, by laying the stages out as a V.

Idea: rank r holds stage r on the way down and stage 2p - 1 - r on the way up, so the first and the last stage share
rank 0 and a microbatch's gradient starts where its forward did. Every rank holds the same, p microbatches. In the
steady state each rank takes F, I, W of its lower stage and F, I, W of its upper stage in turn; I and W stand together
there and part only at the end, where input gradients hurry up the V and the weight gradients fill the rest.

Closed form: idle 0 between a rank's own start and end if F = I = W and m >= 2p - 1; ``(p - 1)F/2`` per rank from the
first start to the last end, the way to the last rank. Peak p. With fewer microbatches the same order with gaps. Twice
1F1B's traffic.

Source: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024, section 6.
"""

from __future__ import annotations

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.families.order import RankOrder, require_two_stages
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule, freeze

__all__ = ["build_zb_v"]


def build_zb_v(num_ranks: int, num_microbatches: int, *, stages_per_rank: int = 2) -> Schedule:
    """Build the V-shaped zero-bubble schedule; two stages on each rank.

    Raises:
        ScheduleError: another number of stages per rank.
    """
    require_two_stages("zb-v", stages_per_rank)
    orders = [_order(rank, num_ranks, num_microbatches) for rank in range(num_ranks)]
    return Schedule("zb-v", num_microbatches, Placement(num_ranks, 2, "v"), freeze(orders))


def _order(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    down, up = rank, 2 * num_ranks - 1 - rank
    below = num_ranks - rank  # ranks from here to the point of the V
    full = max(num_microbatches, 2 * num_ranks - 1)  # the least that fills the V; `finish` drops what is too many
    order = RankOrder()
    for _ in range(2 * below - 1):
        order.add(down, Kind.F)
    for _ in range(rank):
        order.add(up, Kind.F)
        order.add(down, Kind.F)
    for _ in range(below):
        order.add(up, Kind.F, Kind.I, Kind.W)
    while order.count(up, Kind.F) < full:
        if order.count(down, Kind.F) < full:
            order.add(down, Kind.F)
        order.add(down, Kind.I, Kind.W)
        order.add(up, Kind.F, Kind.I, Kind.W)
    for _ in range(rank):
        order.add(down, Kind.I)
        order.add(up, Kind.I)
    for _ in range(below):
        order.add(down, Kind.I, Kind.W)
    for stage in (up, down):
        while order.count(stage, Kind.W) < full:
            order.add(stage, Kind.W)
    return order.finish(num_microbatches)
