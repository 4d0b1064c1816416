"""How much a schedule's ranks send each other."""

from __future__ import annotations

from itertools import pairwise

from vpipe.schedule.placement import Placement

__all__ = ["traffic"]


def traffic(placement: Placement) -> float:
    """Return the messages per microbatch, relative to one stage per rank (p - 1 each way); 0 on a single rank.

    A V of two stages per rank has exactly 2; a loop of v stages has ``(v p - 1)/(p - 1)``, about v.
    """
    if placement.num_ranks == 1:
        return 0.0
    ranks = [placement.rank_of(stage) for stage in range(placement.num_stages)]
    crossings = sum(here != there for here, there in pairwise(ranks))
    return crossings / (placement.num_ranks - 1)
