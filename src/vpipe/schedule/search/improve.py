"""Tabu search over orders: swap neighbours on a rank where it may shorten the longest path.

Only operations on a longest path matter, so each step takes one such path and swaps two operations that follow each
other on it and on one rank. What the swap will give is estimated from the times before and after it, without running
the orders again; the best swap that does not undo a recent one is made, even if it is worse. A swap of two operations
that are neighbours on a longest path never leads into a deadlock.

Source: Nowicki and Smutnicki, "A Fast Taboo Search Algorithm for the Job Shop Problem", Management Science 1996; the
estimate is Taillard's (1994).
"""

from __future__ import annotations

from random import Random

from vpipe.schedule.search.problem import Orders, SearchProblem
from vpipe.schedule.search.timing import Timing

__all__ = ["improve"]

_TENURE = 8


def improve(
    problem: SearchProblem, orders: Orders, num_swaps: int, random: Random, goal: int, patience: int
) -> tuple[Orders, int, int]:
    """Return the best orders found, their makespan, and the number of swaps made.

    Ends after `num_swaps`, after `patience` swaps without anything better, or when the makespan is at most `goal`.
    """
    return _Tabu(problem, orders, random).run(num_swaps, goal, patience)


class _Tabu:
    def __init__(self, problem: SearchProblem, orders: Orders, random: Random) -> None:
        self._problem = problem
        self._orders = [list(order) for order in orders]
        self._timing = Timing(problem)
        self._random = random
        self._forbidden: dict[tuple[int, int], int] = {}
        self._width = problem.num_microbatches
        self._rank_of = [problem.rank_of[letter // 3] for letter in range(3 * problem.placement.num_stages)]
        self._places = [0] * problem.num_operations
        self._held = [0] * problem.num_operations  # by its rank, before an operation
        for order in self._orders:
            held = 0
            for place, operation in enumerate(order):
                self._places[operation], self._held[operation] = place, held
                held += self._change(operation)

    def _change(self, operation: int) -> int:
        return 1 - operation // self._width % 3

    def run(self, num_swaps: int, goal: int, patience: int) -> tuple[Orders, int, int]:
        timing, orders = self._timing, self._orders
        timing.run(orders)
        best, best_orders = timing.makespan, [list(order) for order in orders]
        swaps = stale = 0
        while swaps < num_swaps and best > goal and stale < patience:
            timing.run_back()
            swap = self._choose(swaps, best)
            if swap is None:
                break
            self._swap(*swap)
            if not timing.run(orders):  # operations that take no time may wait in a circle
                self._swap(swap[1], swap[0])
                timing.run(orders)
            self._forbidden[swap] = swaps + _TENURE + self._random.randrange(_TENURE)
            swaps, stale = swaps + 1, stale + 1
            if timing.makespan < best:
                best, best_orders, stale = timing.makespan, [list(order) for order in orders], 0
        return best_orders, best, swaps

    def _swap(self, first: int, second: int) -> None:
        """Run `second`, which follows `first` on its rank, before it."""
        order = self._orders[self._rank_of[first // self._width]]
        place = self._places[first]
        order[place], order[place + 1] = second, first
        self._places[first], self._places[second] = place + 1, place
        self._held[second] = self._held[first]
        self._held[first] += self._change(second)

    def _choose(self, step: int, best: int) -> tuple[int, int] | None:
        """Return the neighbours to swap, or None when there are none."""
        candidates = []
        for first, second in self._pairs():
            estimate = self._estimate(first, second)
            undoes = self._forbidden.get((second, first), -1) >= step and estimate >= best
            candidates.append((undoes, estimate, self._random.random(), (first, second)))
        return min(candidates)[-1] if candidates else None

    def _pairs(self) -> list[tuple[int, int]]:
        """Return the neighbours on one longest path that may be swapped."""
        timing = self._timing
        firsts = [order[0] for order in self._orders if order]
        current = self._random.choice([each for each in firsts if timing.tails[each] == timing.makespan])
        pairs: list[tuple[int, int]] = []
        while True:
            neighbour = self._neighbour(current)
            options = self._next_on_path(current, neighbour)
            if not options:
                return pairs
            chosen = options[0] if len(options) == 1 else self._random.choice(options)
            if chosen == neighbour and self._may_swap(current, chosen):
                pairs.append((current, chosen))
            current = chosen

    def _neighbour(self, operation: int) -> int:
        """Return what follows `operation` on its rank, or -1."""
        order = self._orders[self._rank_of[operation // self._width]]
        place = self._places[operation] + 1
        return order[place] if place < len(order) else -1

    def _next_on_path(self, operation: int, neighbour: int) -> list[int]:
        """Return what may follow `operation` on a longest path: what starts the moment its result is there."""
        timing = self._timing
        heads, tails, makespan = timing.heads, timing.tails, timing.makespan
        end, target = heads[operation] + timing.durations[operation], timing.targets[operation]
        options = []
        if neighbour >= 0 and heads[neighbour] == end and end + tails[neighbour] == makespan:
            options.append(neighbour)
        if target >= 0 and target != neighbour:
            start = end + timing.delays[target]
            if heads[target] == start and start + tails[target] == makespan:
                options.append(target)
        return options

    def _may_swap(self, first: int, second: int) -> bool:
        letter, other = first // self._width, second // self._width
        if letter == other or self._timing.sources[second] == first or self._share_a_link(letter, other):
            return False
        if other % 3 == 0 and letter % 3 == 2:
            rank = self._rank_of[letter]
            return self._held[first] < self._problem.capacity[rank]
        return True

    def _share_a_link(self, letter: int, other: int) -> bool:
        """Return whether messages of both go over one link: their order there is that of two ranks, so it stays."""
        if letter % 3 != other % 3:
            return False
        return any(
            link is not None and link == second
            for link, second in zip(self._problem.channels[letter], self._problem.channels[other], strict=True)
        )

    def _estimate(self, first: int, second: int) -> int:
        """Return the longest path through either of two neighbours after their swap."""
        timing = self._timing
        order = self._orders[self._rank_of[first // self._width]]
        place = self._places[first]
        before = 0
        if place:
            previous = order[place - 1]
            before = timing.heads[previous] + timing.durations[previous]
        head = max(before, self._ready(second))
        middle = head + timing.durations[second]
        late = max(middle, self._ready(first))
        after = timing.tails[order[place + 2]] if place + 2 < len(order) else 0
        tail = timing.durations[first] + max(after, self._outside(first))
        whole = timing.durations[second] + max(tail, self._outside(second))
        return max(head + whole, late + tail)

    def _ready(self, operation: int) -> int:
        timing = self._timing
        source = timing.sources[operation]
        return timing.heads[source] + timing.durations[source] + timing.delays[operation] if source >= 0 else 0

    def _outside(self, operation: int) -> int:
        target = self._timing.targets[operation]
        return self._timing.tails[target] + self._timing.delays[target] if target >= 0 else 0
