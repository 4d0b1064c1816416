"""Interleaved 1F1B: several stages on each rank, so that the pipeline fills with smaller pieces.

Idea: rank r holds the stages r, r + p, r + 2p, ... Microbatches go through in rounds of at least p: the first stage
of the rank for the whole round, then its second stage for the round, ...; backwards likewise, last stage first. After
a warmup of ``(v - 1) x round + 2(p - 1 - r)`` forwards, one forward and one backward in turn. Filling and draining cost
a v-th of 1F1B's, a microbatch crosses v times as many links.

Rounds are of p microbatches. When m is not a multiple of p, ``m // p`` rounds share them, the earlier ones one longer;
fewer than p are one round. (A short last round would leave ranks waiting, or deadlock.)

Closed form: idle ``(p - 1)(F + B)/v`` per rank for every m >= p, ``(v p + m - 1)(F + B)/v`` in all for m < p; rank 0
holds ``p + (p - 1)/v`` microbatches if m is a multiple of p, in whole-rank units.

Source: Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC 2021.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule, freeze

__all__ = ["build_interleaved"]


def build_interleaved(num_ranks: int, num_microbatches: int, *, stages_per_rank: int = 2) -> Schedule:
    """Build interleaved 1F1B with any number of stages per rank; with one it is 1F1B."""
    placement = Placement(num_ranks, stages_per_rank)
    rounds = _rounds(num_ranks, num_microbatches)
    turns = range(stages_per_rank)
    forwards = [(turn, microbatch) for batch in rounds for turn in turns for microbatch in batch]
    backwards = [(turn, microbatch) for batch in rounds for turn in reversed(turns) for microbatch in batch]
    orders = []
    for rank in range(num_ranks):
        stages = placement.stages_of(rank)
        ahead = [Action(stages[turn], Kind.F, microbatch) for turn, microbatch in forwards]
        back = [Action(stages[turn], Kind.B, microbatch) for turn, microbatch in backwards]
        hops = 2 if stages_per_rank > 1 else 1  # with one stage per rank, 1F1B's warmup is enough
        warmup = min((stages_per_rank - 1) * len(rounds[0]) + hops * (num_ranks - 1 - rank), len(ahead))
        order = ahead[:warmup]
        for pair in zip(ahead[warmup:], back, strict=False):
            order += pair
        order += back[len(ahead) - warmup :]
        order += [Action(stage, Kind.STEP, num_microbatches - 1) for stage in reversed(stages)]
        orders.append(order)
    return Schedule("interleaved", num_microbatches, placement, freeze(orders))


def _rounds(num_ranks: int, num_microbatches: int) -> list[range]:
    """Cut the microbatches into rounds of at least `num_ranks`, as equal as can be, longer ones first."""
    count = max(1, num_microbatches // num_ranks)
    short, longer = divmod(num_microbatches, count)
    sizes = [short + 1] * longer + [short] * (count - longer)
    return [range(start, end) for start, end in pairwise(accumulate(sizes, initial=0))]
