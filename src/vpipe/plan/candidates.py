"""Cuts worth simulating: the one with the least busy stage, near ones with less to do in all, and what others do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from vpipe.plan.costs import Array
from vpipe.plan.partition import partition_by_weight, partition_uniform
from vpipe.plan.partition_exact import cut_least_sum, cut_minimax, each_matrix
from vpipe.plan.stage_times import StageTimes

__all__ = ["candidate_cuts", "naive_cuts", "neighbours"]

_SLACKS = (1.0, 1.02, 1.05, 1.1)
_ROUNDING = 1 + 1e-12


def candidate_cuts(times: StageTimes) -> list[list[int]]:
    """Return distinct cuts, the one with the least busy stage first; none where nothing fits.

    How long a batch takes depends on more than its busiest stage, so each bound on that one gives the cut with the
    least total time, and the most even one.
    """
    value, best, matrices = times.best
    cuts = [best] if best else []
    if best:
        for slack in _SLACKS:
            bounded = each_matrix(matrices, partial(_up_to, bound=value * slack * _ROUNDING))
            cuts += [cut_least_sum(bounded)[1], cut_least_sum(each_matrix(bounded, np.square))[1]]
    cuts += naive_cuts(times).values()
    return [list(cut) for cut in dict.fromkeys(map(tuple, cuts)) if cut]


def naive_cuts(times: StageTimes) -> dict[str, list[int]]:
    """Return the cuts that need no search, by name: `uniform`, `parameters`, `compute`."""
    blocks, num_stages = times.chain.blocks, len(times.loads)
    if num_stages > len(blocks):
        return {}
    return {
        "uniform": partition_uniform(len(blocks), num_stages),
        "parameters": partition_by_weight([block.parameter_bytes for block in blocks], num_stages),
        "compute": _by_compute(times),
    }


def _by_compute(times: StageTimes) -> list[int]:
    """Cut with the least measured time on the busiest stage; ranks that are faster get more."""
    chain = times.chain
    if len(set(times.speeds)) == 1:
        return partition_by_weight([block.forward_ms + block.backward_ms for block in chain.blocks], len(times.speeds))
    work = sum(chain.between(name) for name in ("forward_ms", "input_grad_ms", "weight_grad_ms"))
    return cut_minimax([np.where(chain.is_stage, work / speed, np.inf) for speed in times.speeds])[1]


def neighbours(partition: Sequence[int]) -> Iterator[list[int]]:
    """Yield the cuts that move one boundary by one block."""
    for cut in range(len(partition) - 1):
        for step in (1, -1):
            moved = list(partition)
            moved[cut] += step
            moved[cut + 1] -= step
            if min(moved[cut], moved[cut + 1]) > 0:
                yield moved


def _up_to(matrix: Array, bound: float) -> Array:
    return np.where(matrix <= bound, matrix, np.inf)
