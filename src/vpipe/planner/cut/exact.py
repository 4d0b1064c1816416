"""The best contiguous cut for costs that may depend on stage and interval in any way: dynamic programmes, exact.

A cost is a matrix per stage: [i, j] is what the stage costs with blocks i to j - 1, infinite where it cannot have them.
Costs that only grow with the interval allow a faster greedy search (`partition_by_weight`); messages that are larger in
the middle of an interval than at its ends, and byte limits with them, do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vpipe.planner.cost.costs import Array

__all__ = ["cut_least_sum", "cut_minimax", "each_matrix", "useful_intervals"]


def cut_minimax(costs: Sequence[Array]) -> tuple[float, list[int]]:
    """Cut so that the most expensive stage costs as little as possible.

    Returns:
        That cost, and blocks per stage; infinity and nothing when no cut is possible.
    """
    return _cut(costs, np.maximum)


def cut_least_sum(costs: Sequence[Array]) -> tuple[float, list[int]]:
    """Cut so that the sum of all stages' costs is as small as possible; returns as `cut_minimax`."""
    return _cut(costs, np.add)


def _cut(costs: Sequence[Array], combine: np.ufunc) -> tuple[float, list[int]]:
    num_blocks = len(costs[0]) - 1
    best = np.full(num_blocks + 1, np.inf)
    best[0] = 0.0
    starts = []
    for cost in costs:
        # Only from blocks that earlier stages can end before.
        reached = np.flatnonzero(np.isfinite(best))
        if not len(reached):
            return np.inf, []
        low, high = reached[0], reached[-1] + 1
        totals = combine(best[low:high, None], cost[low:high, low + 1 :])
        starts.append(np.concatenate([np.zeros(low + 1, dtype=np.intp), totals.argmin(axis=0) + low]))
        best = np.concatenate([np.full(low + 1, np.inf), totals.min(axis=0)])
    if not np.isfinite(best[num_blocks]):
        return np.inf, []
    ends = [num_blocks]
    for start in reversed(starts):
        ends.append(int(start[ends[-1]]))
    return float(best[num_blocks]), [stop - start for start, stop in pairwise(reversed(ends))]


def useful_intervals(allowed: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
    """Return, for every stage, which of its allowed intervals belong to a cut of the whole chain."""
    num_blocks = len(allowed[0]) - 1
    from_left = [np.arange(num_blocks + 1) == 0]
    for matrix in allowed:
        from_left.append((from_left[-1][:, None] & matrix).any(axis=0))
    to_right = [np.arange(num_blocks + 1) == num_blocks]
    for matrix in reversed(allowed):
        to_right.append((matrix & to_right[-1][None, :]).any(axis=1))
    to_right.reverse()
    return [matrix & from_left[stage][:, None] & to_right[stage + 1][None, :] for stage, matrix in enumerate(allowed)]


def each_matrix(matrices: Sequence[Array], change: Callable[[Array], Array]) -> list[Array]:
    """Change every stage's matrix; where stages share one, they share what comes of it."""
    distinct = {id(matrix): matrix for matrix in matrices}
    changed = {key: change(matrix) for key, matrix in distinct.items()}
    return [changed[id(matrix)] for matrix in matrices]
