"""The smallest byte limit that can be kept: what to say when one cannot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpipe.plan.costs import Array, ChainCosts, swap_copies
from vpipe.plan.memory import Policy, StageLoad, held_bytes, transient_bytes
from vpipe.plan.partition_exact import cut_minimax
from vpipe.plan.situation import Situation

__all__ = ["least_bytes", "smallest_limits"]

_THRESHOLDS_TIMES_BLOCKS = 2400


def smallest_limits(
    situation: Situation, partition: Sequence[int] | None = None
) -> tuple[tuple[int, ...], Sequence[int]]:
    """Return the smallest limits per rank that can be kept, in the proportion of those given (equal if none are).

    Time does not count here. Of several stages on a rank each gets its share, so a little less may do; otherwise it is
    exact, but for chains of many unlike blocks with split backwards. With a `partition`, those that this cut can keep.

    Returns:
        Limits, and the blocks per stage that keep them.
    """
    given = situation.limits if np.isfinite(situation.limits).all() else (1.0,) * len(situation.limits)
    placement = situation.schedule.placement
    times = situation.times
    shares = [share * given[placement.rank_of(stage)] for stage, share in enumerate(situation.stage_shares)]
    relative = [
        np.where(times.chain.is_stage, least_bytes(times.chain, load, times.frontiers.policies) / share, np.inf)
        for load, share in zip(times.loads, shares, strict=True)
    ]
    if partition is None:
        factor, partition = cut_minimax(relative)
    else:
        cuts = pairwise([0, *accumulate(partition)])
        factor = max(float(needs[start, stop]) for needs, (start, stop) in zip(relative, cuts, strict=True))
    return tuple(int(np.ceil(factor * limit - 1e-6)) for limit in given), partition


def least_bytes(chain: ChainCosts, load: StageLoad, policies: Sequence[Policy]) -> Array:
    """Return the fewest bytes that a stage can do with, for every interval.

    Blocks that recompute hold little, but need much for a moment. So for each bound on what may be needed for a moment
    every block takes the policy that holds least within it; the best of the bounds counts.
    """
    needs = np.array([[float(transient_bytes(block, policy)) for policy in policies] for block in chain.blocks])
    full = max(load.held)[0]
    holds = np.array([[float(held_bytes(block, policy, full)) for policy in policies] for block in chain.blocks])
    swapped = np.array([[policy is Policy.SWAP for policy in policies]] * len(chain))
    unit = np.array([[block.activation_bytes for _ in policies] for block in chain.blocks], dtype=float)
    # What a microbatch holds, whatever the peak: a block that swaps holds none of it for every one in flight.
    each = np.where(swapped, 0.0, holds / max(1, full))
    best = np.full((len(chain) + 1,) * 2, np.inf)
    for bound in _thresholds(needs):
        allowed = np.where(needs <= bound, holds, np.inf)
        choice = allowed.argmin(axis=1)
        rows = np.arange(len(chain))
        possible = np.isfinite(allowed[rows, choice])
        held = _between(each[rows, choice])
        out = _between(np.where(possible & swapped[rows, choice], unit[rows, choice], 0.0))
        peaks = [
            count * (held + chain.passing[:, None]) + swap_copies(count) * out + halves * chain.weight_held
            for count, halves in load.held
        ]
        needed = np.where(_between(~possible) > 0, np.inf, np.maximum.reduce(peaks) + bound)
        best = np.minimum(best, needed)
    return np.asarray(best + chain.static_bytes(load))


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
