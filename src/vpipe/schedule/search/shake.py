"""Random legal changes of orders: where a search goes on from when swaps on the longest path have led it to a dead end.

Neighbours on a rank change places wherever they may. Two operations whose messages share a link change places on every
rank that these messages pass, since both ends of a link must list its messages in the same order: that is a change
which no swap on one rank can make.
"""

from __future__ import annotations

from random import Random

from vpipe.schedule.search.problem import Orders, SearchProblem
from vpipe.schedule.search.timing import Timing

__all__ = ["shake"]

_TRIES = 10


def shake(problem: SearchProblem, orders: Orders, num_changes: int, random: Random) -> Orders:
    """Return `orders` with up to `num_changes` random changes, legal and within the memory."""
    timing = Timing(problem)
    for _ in range(num_changes):
        for _ in range(_TRIES):
            changed = _change(problem, orders, random)
            if changed is not None and timing.run(changed):
                orders = changed
                break
    return orders


def _change(problem: SearchProblem, orders: Orders, random: Random) -> Orders | None:
    rank = random.randrange(len(orders))
    if len(orders[rank]) < 2:
        return None
    place = random.randrange(len(orders[rank]) - 1)
    first = orders[rank][place]
    width = problem.num_microbatches
    second = orders[rank][place + 1]
    changed = list(orders)
    for one, other in _pairs(problem, first, second):
        rank = problem.rank_of[one // (3 * width)]
        moved = _move_before(changed[rank], one, other, width)
        if moved is None or not _fits(moved, problem.capacity[rank], width):
            return None
        changed[rank] = moved
    return changed


def _pairs(problem: SearchProblem, first: int, second: int) -> list[tuple[int, int]]:
    """Return the pairs that have to change places together: of all stages whose messages share links with theirs."""
    width, channels = problem.num_microbatches, problem.channels
    pairs = [(first, second)]
    if first // width % 3 != second // width % 3:
        return pairs
    for end, step in ((0, -3), (1, 3)) if first // width % 3 == 0 else ((0, 3), (1, -3)):
        one, other = first, second
        while (link := channels[one // width][end]) is not None and link == channels[other // width][end]:
            one, other = one + step * width, other + step * width
            pairs.append((one, other))
    return pairs


def _move_before(order: list[int], one: int, other: int, width: int) -> list[int] | None:
    """Return the order with `other` right before `one`, which comes earlier; None where microbatches would pass."""
    start, end = order.index(one), order.index(other)
    if start > end or any(each // width == other // width for each in order[start:end]):
        return None
    return [*order[:start], other, *order[start:end], *order[end + 1 :]]


def _fits(order: list[int], capacity: int, width: int) -> bool:
    held = 0
    for operation in order:
        held += 1 - operation // width % 3
        if held > capacity:
            return False
    return True
