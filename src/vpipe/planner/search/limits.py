"""The smallest byte limit that can be kept: what to say when one cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpipe.plan.partition import Partition
from vpipe.plan.policy import Policy
from vpipe.planner.cost.costs import Array, ChainCosts
from vpipe.planner.cost.loads import SWAP_BUFFERS, Moment, StageLoad
from vpipe.planner.cost.memory import each_bytes, transient_of
from vpipe.planner.cost.policies import Frontiers, StageFit
from vpipe.planner.cut.candidates import searched_cuts
from vpipe.planner.cut.exact import cut_minimax, useful_intervals
from vpipe.planner.search.shared_cuts import rank_bytes, small_cut
from vpipe.planner.search.situation import Situation

__all__ = ["Smallest", "find_smallest", "least_bytes", "needed_limit", "scaled_limits", "usable_bytes"]

_THRESHOLDS_TIMES_BLOCKS = 2400
_SHARE_LEFT = 100
_MOST_INTERVALS, _MOST_CUTS = 2000, 400
"""Intervals that frontiers are computed of to find the smallest limit of a long chain; beyond, cuts that are tried."""


@dataclass(frozen=True)
class Smallest:
    """A cut that small limits are enough for."""

    partition: tuple[int, ...]
    needs: tuple[float, ...]
    """Fewest bytes found that each rank can do with."""
    factor: float
    """By how much the given limits have to be multiplied."""
    is_proven: bool
    """Whether no cut and no policies do with limits multiplied by less."""


def find_smallest(situation: Situation, partition: Sequence[int] | None = None) -> Smallest:
    """Find what keeps the smallest limits, in the proportion of those given (equal if none are).

    Time does not count here. It is exact for one stage per rank, as long as the frontiers of the intervals that matter
    are; otherwise a search. With a `partition`, what keeps the smallest limits with this cut.
    """
    given = situation.limits if np.isfinite(situation.limits).all() else (1.0,) * len(situation.limits)
    if situation.shares_ranks:
        cut, is_proven = partition or small_cut(situation, given), False
        needs = rank_bytes(situation, cut)
    else:
        least = _LeastBytes(situation.times.frontiers, situation.loads)
        cut, is_complete = (partition, True) if partition else _small_cut(situation, given, least)
        needs = least.of_cut(cut)
        is_proven = is_complete and situation.times.frontiers.is_exact
    factor = max(need / limit for need, limit in zip(needs, given, strict=True))
    return Smallest(tuple(cut), needs, factor, is_proven)


def scaled_limits(limits: Sequence[float], factor: float) -> tuple[int, ...]:
    """Return the limits of which so many times the usable `limits` can be used; infinite ones count as 1 byte."""
    given = limits if np.isfinite(limits).all() else (1.0,) * len(limits)
    return tuple(needed_limit(int(np.ceil(factor * limit - 1e-6))) for limit in given)


class _LeastBytes:
    """Fewest bytes of stages that have their rank to themselves, by their frontiers."""

    def __init__(self, frontiers: Frontiers, loads: Sequence[StageLoad]) -> None:
        self.frontiers, self.loads = frontiers, loads
        self._static = np.array([frontiers.chain.static_bytes(load) for load in loads])
        self._fit = StageFit.of(loads, [1.0] * len(loads), [np.inf] * len(loads))
        self._found: dict[tuple[int, int, int], float] = {}

    def of_stages(self, stages: NDArray[np.intp], start: int, stop: int) -> Array:
        """Return what each of some stages needs for one interval."""
        fit = self._fit.select(stages)
        return np.asarray(self.frontiers.least_bytes(start, stop, fit) + self._static[stages, start, stop])

    def of_cut(self, partition: Sequence[int]) -> tuple[float, ...]:
        """Return what every stage of a cut needs."""
        keys = [(stage, *cut) for stage, cut in enumerate(Partition(partition).ranges)]
        for key in keys:
            if key not in self._found:
                self._found[key] = float(self.of_stages(np.array([key[0]]), *key[1:])[0])
        return tuple(self._found[key] for key in keys)


def _small_cut(situation: Situation, given: Sequence[float], least: _LeastBytes) -> tuple[Sequence[int], bool]:
    """Return the cut whose stages need the smallest share of the limits, and whether all cuts were looked at."""
    chain, frontiers = situation.chain, situation.times.frontiers
    relative = [
        np.where(chain.is_stage, least_bytes(frontiers, load) / limit, np.inf)
        for load, limit in zip(situation.loads, given, strict=True)
    ]
    _, cut = cut_minimax(relative)
    if frontiers.is_short:
        return cut, True

    def cost(cut: Sequence[int]) -> tuple[float, ...]:
        shares = np.array(least.of_cut(cut)) / given
        return float(shares.max()), float(shares.sum())

    # A better cut has none but intervals that may need less than the largest of this one.
    factor = cost(cut)[0] * (1 + 1e-9)
    tight = situation.under([factor * limit for limit in given]).times
    allowed = np.array(useful_intervals([np.isfinite(matrix) for matrix in tight.optimistic]))
    intervals = np.argwhere(allowed.any(axis=0))
    if len(intervals) > _MOST_INTERVALS:
        return searched_cuts(cost, [cut], len(chain), len(given), _MOST_CUTS)[0][1], False
    relative = list(np.full(allowed.shape, np.inf))
    for start, stop in intervals:
        stages = np.flatnonzero(allowed[:, start, stop])
        for stage, num_bytes in zip(stages, least.of_stages(stages, start, stop), strict=True):
            relative[stage][start, stop] = num_bytes / given[int(stage)]
    return cut_minimax(relative)[1], True


def usable_bytes(limit: int) -> int:
    """Return what of a limit is planned with: 1 % is left for what depends on chance, such as messages that wait."""
    return limit - limit // _SHARE_LEFT


def needed_limit(num_bytes: int) -> int:
    """Return the smallest limit of which so many bytes are usable."""
    limit = num_bytes * _SHARE_LEFT // (_SHARE_LEFT - 1)
    while usable_bytes(limit - 1) >= num_bytes:
        limit -= 1
    return limit


def least_bytes(frontiers: Frontiers, load: StageLoad) -> Array:
    """Return the fewest bytes that the planner can make a stage do with, for every interval.

    For long chains that would take too long. There, for each of some bounds on what may be needed for a moment, every
    block takes the policy that holds least within it, and the best of the bounds counts: a little less may do.
    """
    if not frontiers.is_short:
        return _about_least_bytes(frontiers.chain, load, frontiers.policies)
    chain = frontiers.chain
    best = np.full((len(chain) + 1,) * 2, np.inf)
    for start, stop in np.argwhere(chain.is_stage):
        best[start, stop] = _least_bytes_of(frontiers, load, int(start), int(stop))
    return best


def _least_bytes_of(frontiers: Frontiers, load: StageLoad, start: int, stop: int) -> float:
    fit = StageFit.of([load], [1.0], [np.inf])
    return float(frontiers.least_bytes(start, stop, fit)[0] + frontiers.chain.static_bytes(load)[start, stop])


def _about_least_bytes(chain: ChainCosts, load: StageLoad, policies: Sequence[Policy]) -> Array:
    needs = np.array(
        [
            [float(max(transient_of(block, policy, is_split=chain.is_split))) for policy in policies]
            for block in chain.blocks
        ]
    )
    each = np.array([[each_bytes(block, policy) for policy in policies] for block in chain.blocks], dtype=float)
    holds = each @ np.array([load.full, min(load.full, SWAP_BUFFERS)], dtype=float)
    best = np.full((len(chain) + 1,) * 2, np.inf)
    for bound in _thresholds(needs):
        allowed = np.where(needs <= bound, holds, np.inf)
        choice = allowed.argmin(axis=1)
        rows = np.arange(len(chain))
        possible = np.isfinite(allowed[rows, choice])
        held, out = (_between(figures) for figures in each[rows, choice].T)
        peaks = [
            chain.moment_bytes(moment)
            + moment.full * held
            + moment.copies * out
            + _at_most(chain, moment, bound)
            # Of the first block's input a message is left when it is moved, else those that are needed no more.
            + max(1, moment.stale) * chain.arriving[:, None]
            for moment in load.moments
        ]
        needed = np.where(_between(~possible) > 0, np.inf, np.maximum.reduce(peaks))
        best = np.minimum(best, needed)
    return np.asarray(best + chain.static_bytes(load))


def _at_most(chain: ChainCosts, moment: Moment, bound: float) -> Array:
    """Return what is needed for a moment where no block needs more than `bound`.

    On top come at worst the gradients that a first backward makes, and what later blocks leave to weight halves.
    """
    if moment.is_weights or moment.is_step:
        return np.zeros_like(chain.parameters)
    left = chain.weight_held if chain.is_split else 0.0
    return np.asarray(bound + left + (0.0 if moment.gradients else chain.parameters))


def _thresholds(needs: Array) -> Array:
    """Return the bounds to try: every size that occurs, or evenly spread ones of them, the largest included."""
    values = np.unique(needs)
    most = max(4, _THRESHOLDS_TIMES_BLOCKS // len(needs))
    if len(values) > most:
        values = values[np.linspace(0, len(values) - 1, most).round().astype(int)]
    return values


def _between(figures: NDArray[Any]) -> Array:
    """Sum over every interval."""
    sums = np.concatenate([[0.0], np.cumsum(figures)])
    return np.asarray(sums[None, :] - sums[:, None])
