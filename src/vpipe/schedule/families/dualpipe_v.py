"""DualPipe-V: a V of stages in which every forward has a backward of the other stage beside it.

Idea: DeepSeek's DualPipe runs two copies of the model in opposite directions; cut in half it is a V with two stages on
each rank. In the steady state a rank takes a forward of one of its stages and a full backward of the other as a pair,
which it may overlap: the communication inside the one (expert parallelism's all-to-all) hides behind the computation
of the other. Here the two are neighbours, forward first. Backwards are split only where that fills a gap, at both ends.

Closed form: with m >= 2p the makespan of ZB-V, ``(p - 1)F/2`` idle per rank if F = I = W and nothing overlaps; holds
p + 1/2 microbatches (the authors count p + 1). With fewer microbatches the same order with gaps. Twice 1F1B's traffic.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, and github.com/deepseek-ai/DualPipe; the V ("cut in half") is
by Sea AI Lab, 2025.
"""

from __future__ import annotations

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.families.order import RankOrder, require_two_stages
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule, freeze

__all__ = ["build_dualpipe_v"]


def build_dualpipe_v(num_ranks: int, num_microbatches: int, *, stages_per_rank: int = 2) -> Schedule:
    """Build DualPipe-V, pairs as neighbours; two stages on each rank.

    Raises:
        ScheduleError: another number of stages per rank.
    """
    require_two_stages("dualpipe-v", stages_per_rank)
    orders = [_order(rank, num_ranks, num_microbatches) for rank in range(num_ranks)]
    return Schedule("dualpipe-v", num_microbatches, Placement(num_ranks, 2, "v"), freeze(orders))


def _order(rank: int, num_ranks: int, num_microbatches: int) -> list[Action]:
    down, up = rank, 2 * num_ranks - 1 - rank
    below = num_ranks - 1 - rank
    full = max(num_microbatches, 2 * num_ranks)  # the least that fills the V; `finish` drops what is too many
    order = RankOrder()
    for _ in range(2 * below):
        order.add(down, Kind.F)
    for _ in range(rank + 1):
        order.add(down, Kind.F)
        order.add(up, Kind.F)
    for _ in range(below):
        order.add(up, Kind.I, Kind.W, Kind.F)
    for _ in range(full - 2 * num_ranks + rank + 1):
        order.add(down, Kind.F)
        order.add(up, Kind.B, Kind.F)
        order.add(down, Kind.B)
    for _ in range(below):
        order.add(up, Kind.B, Kind.F)
        order.add(down, Kind.B)
    _drain(order, down, up, rank + 1, below)
    return order.finish(num_microbatches)


def _drain(order: RankOrder, down: int, up: int, pairs: int, below: int) -> None:
    """Add the backwards that are left: whole ones first, the later half split to let the input gradients ahead."""
    for index in range(2 * pairs):
        stage = down if index % 2 else up
        if index >= pairs:
            order.add_deferring(stage)
        else:
            order.add(stage, Kind.B)
    for _ in range(below):
        order.add_deferred()
        order.add_deferring(down)
    while order.add_deferred():
        pass
