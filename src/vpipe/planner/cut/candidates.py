"""Cuts worth simulating: the one with the least busy stage, near ones with less to do in all, and what others do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations, pairwise
from math import comb

import numpy as np

from vpipe.plan.partition import Partition
from vpipe.plan.policy import Policy
from vpipe.planner.cost.costs import Array
from vpipe.planner.cut.exact import cut_least_sum, cut_minimax, each_matrix
from vpipe.planner.cut.stage_times import StageTimes

__all__ = ["candidate_cuts", "exchanges", "naive_cuts", "neighbours", "searched_cuts"]

_SLACKS = (1.0, 1.02, 1.05, 1.1)
_ROUNDING = 1 + 1e-12
Cost = tuple[float, ...]


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
    cuts += map(list, naive_cuts(times).values())
    return [list(cut) for cut in dict.fromkeys(map(tuple, cuts)) if cut]


def naive_cuts(times: StageTimes) -> dict[str, Partition]:
    """Return the cuts that need no search, by name: `uniform`, `parameters`, `compute`."""
    blocks, num_stages = times.chain.blocks, len(times.loads)
    if num_stages > len(blocks):
        return {}
    return {
        "uniform": Partition.uniform(len(blocks), num_stages),
        "parameters": Partition.by_weight([block.parameter_bytes for block in blocks], num_stages),
        "compute": _by_compute(times),
    }


def _by_compute(times: StageTimes) -> Partition:
    """Cut with the least measured time on the busiest stage; ranks that are faster get more."""
    chain = times.chain
    if len(set(times.speeds)) == 1:
        return Partition.by_weight([block.forward_ms + block.backward_ms for block in chain.blocks], len(times.speeds))
    work = sum(chain.between(name) for name in ("forward_ms", "input_grad_ms", "weight_grad_ms"))
    return Partition(cut_minimax([np.where(chain.is_stage, work / speed, np.inf) for speed in times.speeds])[1])


def neighbours(partition: Sequence[int]) -> Iterator[list[int]]:
    """Yield the cuts that move one boundary by one block."""
    for cut in range(len(partition) - 1):
        for step in (1, -1):
            moved = list(partition)
            moved[cut] += step
            moved[cut + 1] -= step
            if min(moved[cut], moved[cut + 1]) > 0:
                yield moved


def exchanges(
    policies: Sequence[Policy], ranks: Sequence[int], allowed: Sequence[Policy]
) -> Iterator[tuple[Policy, ...]]:
    """Yield the choices with another policy of one block, then of two blocks of a rank, one of which did not keep.

    `ranks` is where each block is.
    """
    changes = [(block, other) for block, own in enumerate(policies) for other in allowed if other is not own]
    for block, other in changes:
        yield _with(policies, (block, other))
    for first, second in combinations(changes, 2):
        (one, _), (two, _) = first, second
        if one != two and ranks[one] == ranks[two] and {policies[one], policies[two]} != {Policy.KEEP}:
            yield _with(policies, first, second)


def _with(policies: Sequence[Policy], *changes: tuple[int, Policy]) -> tuple[Policy, ...]:
    changed = list(policies)
    for block, policy in changes:
        changed[block] = policy
    return tuple(changed)


def searched_cuts(
    cost: Callable[[Sequence[int]], Cost],
    seeds: Iterable[Sequence[int]],
    num_blocks: int,
    num_stages: int,
    most: int,
) -> list[tuple[Cost, list[int]]]:
    """Return cuts with their costs, the cheapest first: all if there are no more than `most`, or those met.

    From the cheapest seed on, boundaries are moved by one block, or a whole stage is, while that is cheaper; then from
    the others.
    """
    if comb(num_blocks - 1, num_stages - 1) <= most:
        inner = combinations(range(1, num_blocks), num_stages - 1)
        cuts = [[stop - start for start, stop in pairwise([0, *ends, num_blocks])] for ends in inner]
        return sorted((cost(cut), cut) for cut in cuts)
    costs = {tuple(seed): cost(seed) for seed in seeds}
    for seed in sorted(costs, key=lambda cut: costs[cut]):
        here, improving = seed, True
        # Half of what is left, so that the next ones have their turn.
        enough = len(costs) + (most - len(costs) + 1) // 2
        while improving and len(costs) < enough:
            improving = False
            for cut in map(tuple, [*neighbours(here), *_shifts(here)]):
                if cut not in costs and len(costs) < enough:
                    costs[cut] = cost(cut)
                    if costs[cut] < costs[here]:
                        here, improving = cut, True
                        break
    return sorted((found, list(cut)) for cut, found in costs.items())


def _shifts(partition: Sequence[int]) -> Iterator[list[int]]:
    """Yield the cuts that move a stage by one block: those beside it get one more, and one fewer."""
    for stage in range(1, len(partition) - 1):
        for step in (1, -1):
            moved = list(partition)
            moved[stage - 1] += step
            moved[stage + 1] -= step
            if min(moved[stage - 1], moved[stage + 1]) > 0:
                yield moved


def _up_to(matrix: Array, bound: float) -> Array:
    return np.where(matrix <= bound, matrix, np.inf)
