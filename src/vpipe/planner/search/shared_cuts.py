"""Cuts for ranks with several stages: by the busiest rank and what fits it, and by the fewest bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from vpipe.plan.partition import Partition
from vpipe.plan.policy import Policy
from vpipe.planner.cost.shared_ranks import Interval, RankWay, SharedRanks
from vpipe.planner.cut.candidates import candidate_cuts, searched_cuts
from vpipe.planner.cut.exact import cut_minimax
from vpipe.planner.search.situation import Situation

__all__ = ["fast_cuts", "rank_bytes", "shared_policies", "small_cut"]

_MOST_ACTIONS = 200_000
"""Actions of all plans together that memory is counted of, as far as these are no fewer than the fewest."""
_MOST_UNLIMITED, _MOST_LIMITED = 2000, 400
"""Cuts that are looked at; with a limit each takes much longer."""
_MOST_CANDIDATES, _FEWEST_CANDIDATES = 40, 8


def fast_cuts(situation: Situation) -> list[list[int]]:
    """Return cuts worth simulating, the most promising first; none where nothing was found that fits."""
    shared, chain = situation.shared, situation.chain
    kept = situation.times.kept
    count, per_rank = situation.setting.num_microbatches, situation.schedule.placement.stages_per_rank

    def of_rank(rank: int, intervals: tuple[Interval, ...]) -> tuple[float, float]:
        if math.isinf(situation.limits[rank]):
            pairs = zip(shared.stages[rank], intervals, strict=True)
            return 0.0, sum(float(kept[stage][cut]) for stage, cut in pairs)
        way, excess = _way(shared, rank, intervals, situation.limits[rank])
        return excess, way.busy_ms

    def cost(cut: Sequence[int]) -> tuple[float, ...]:
        over, times = zip(*map(of_rank, range(len(situation.limits)), shared.intervals(cut)), strict=True)
        once = sum(times) / per_rank if situation.setting.synchronous else max(times)
        # The others wait for a busy stage in its turn, and have less to do in the next: so both count, half and half.
        stage = max(float(matrix[each]) for matrix, each in zip(kept, Partition(cut).ranges, strict=True))
        busiest = (max(times) + max(max(times), per_rank * stage)) / 2
        return max(over), sum(over), once + (count - 1) * busiest, sum(np.square(times))

    seeds = [*candidate_cuts(situation.times), *_small_seeds(situation)]
    looked_at = _MOST_UNLIMITED if all(map(math.isinf, situation.limits)) else _MOST_LIMITED
    ranked = searched_cuts(cost, seeds, len(chain), situation.schedule.num_stages, looked_at)
    most = max(_FEWEST_CANDIDATES, min(_MOST_CANDIDATES, _MOST_ACTIONS // situation.num_actions))
    return [cut for (excess, *_), cut in ranked if excess <= 0][:most]


def shared_policies(situation: Situation, partition: Sequence[int]) -> tuple[Policy, ...] | None:
    """Return the policy of every block under a given partition; None where nothing was found that fits."""
    if all(map(math.isinf, situation.limits)):
        return (Policy.KEEP,) * len(situation.chain)
    found: dict[int, tuple[Policy, ...]] = {}
    intervals = situation.shared.intervals(partition)
    for rank, limit in enumerate(situation.limits):
        way, excess = _way(situation.shared, rank, intervals[rank], limit)
        if excess > 0:
            return None
        found |= dict(zip(situation.shared.stages[rank], way.policies, strict=True))
    return tuple(policy for stage in sorted(found) for policy in found[stage])


def small_cut(situation: Situation, limits: Sequence[float]) -> list[int]:
    """Return the cut found whose ranks need the smallest share of `limits`."""

    def cost(cut: Sequence[int]) -> tuple[float, ...]:
        shares = np.array(rank_bytes(situation, cut)) / limits
        return float(shares.max()), float(shares.sum())

    seeds = [*candidate_cuts(situation.times), *_small_seeds(situation)]
    return searched_cuts(cost, seeds, len(situation.chain), situation.schedule.num_stages, _MOST_LIMITED)[0][1]


def rank_bytes(situation: Situation, partition: Sequence[int]) -> tuple[float, ...]:
    """Return the fewest bytes found that each rank can do with in a cut."""
    shared = situation.shared
    return tuple(shared.smallest(*each).num_bytes for each in enumerate(shared.intervals(partition)))


def _way(shared: SharedRanks, rank: int, intervals: tuple[Interval, ...], limit: float) -> tuple[RankWay, float]:
    """Return how a rank runs its part, and by what share of its limit that is too large."""
    way = shared.fastest(rank, intervals, limit) or shared.smallest(rank, intervals)
    return way, max(0.0, way.num_bytes / limit - 1)


def _small_seeds(situation: Situation) -> Iterator[list[int]]:
    """Yield cuts whose largest stage is small: with all kept, and with inputs alone."""
    chain = situation.chain
    for name in ("activation_bytes", "input_bytes"):
        held = chain.between(name)
        stages = [load.full * held + chain.static_bytes(load) for load in situation.loads]
        yield cut_minimax([np.where(chain.is_stage, needed, np.inf) for needed in stages])[1]
