"""The smallest byte limit that can be kept: what to say when one cannot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpipe.plan.costs import Array, ChainCosts
from vpipe.plan.loads import SWAP_BUFFERS, Moment, StageLoad
from vpipe.plan.memory import Policy, each_bytes, transient_of
from vpipe.plan.partition_exact import cut_minimax
from vpipe.plan.policies import Frontiers, StageFit
from vpipe.plan.situation import Situation

__all__ = ["least_bytes", "needed_limit", "smallest_limits", "usable_bytes"]

_THRESHOLDS_TIMES_BLOCKS = 2400
_SHARE_LEFT = 100


def smallest_limits(
    situation: Situation, partition: Sequence[int] | None = None
) -> tuple[tuple[int, ...], Sequence[int]]:
    """Return the smallest limits per rank that can be kept, in the proportion of those given (equal if none are).

    Time does not count here. Of several stages on a rank each gets its share, so a little less may do, as for long
    chains (`least_bytes`); otherwise it is exact. With a `partition`, those that this cut can keep.

    Returns:
        Limits, and the blocks per stage that keep them.
    """
    given = situation.limits if np.isfinite(situation.limits).all() else (1.0,) * len(situation.limits)
    placement = situation.schedule.placement
    times = situation.times
    shares = [share * given[placement.rank_of(stage)] for stage, share in enumerate(situation.stage_shares)]
    relative = [
        np.where(times.chain.is_stage, least_bytes(times.frontiers, load) / share, np.inf)
        for load, share in zip(times.loads, shares, strict=True)
    ]
    if partition is None:
        _, partition = cut_minimax(relative)
    cuts = zip(times.loads, shares, pairwise([0, *accumulate(partition)]), strict=True)
    factor = max(_least_bytes_of(times.frontiers, load, *cut) / share for load, share, cut in cuts)
    return tuple(needed_limit(int(np.ceil(factor * limit - 1e-6))) for limit in given), partition


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
