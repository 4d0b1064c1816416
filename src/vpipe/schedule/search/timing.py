"""When everything starts and how much follows it: the longest paths through orders of operations.

The same times as the simulator's where links are free, in whole numbers and a few microseconds per hundred operations;
and the paths to the end beside those from the start, which tell what lies on a longest path.
"""

from __future__ import annotations

from itertools import pairwise

from vpipe.schedule.search.problem import Orders, SearchProblem

__all__ = ["Timing", "find_whole_backwards"]


class Timing:
    """Times of orders of one problem; each call overwrites the previous one's results.

    `heads` and `tails`: per operation, the time before it starts, and from its start to the end of everything that
    waits for it. `makespan` is the longest sum of both; an operation that has it is *critical*.
    """

    def __init__(self, problem: SearchProblem) -> None:
        width, stages = problem.num_microbatches, problem.placement.num_stages
        self.problem = problem
        self.num_operations = problem.num_operations
        self.durations = [time for time in problem.durations for _ in range(width)]
        # What an operation waits for beside its own rank, and the time the message takes; -1: nothing.
        self.sources = [-1] * self.num_operations
        self.delays = [0] * self.num_operations
        forward, backward = problem.lags
        for stage in range(stages):
            for microbatch in range(width):
                first = 3 * stage * width + microbatch
                if stage:
                    self.sources[first], self.delays[first] = first - 3 * width, forward[stage - 1]
                if stage < stages - 1:
                    self.sources[first + width], self.delays[first + width] = first + 4 * width, backward[stage]
                else:
                    self.sources[first + width] = first
                self.sources[first + 2 * width] = first + width
        # Whom an operation sends to: a rank may wait for it. W follows its I on the same rank by the order's own rule.
        self.targets = [-1] * self.num_operations
        for operation, source in enumerate(self.sources):
            if source >= 0 and operation // width % 3 < 2:
                self.targets[source] = operation
        self.heads = [0] * self.num_operations
        self.tails = [0] * self.num_operations
        self.makespan = 0
        self._sequence: list[int] = []

    def run(self, orders: Orders) -> bool:
        """Compute `heads` and `makespan`; return whether the ranks reach their ends at all."""
        durations, sources, delays, heads = self.durations, self.sources, self.delays, self.heads
        ends = [-1] * self.num_operations
        waiting = [-1] * self.num_operations
        places, clocks = [0] * len(orders), [0] * len(orders)
        sequence: list[int] = []
        runnable = list(range(len(orders) - 1, -1, -1))
        while runnable:
            rank = runnable.pop()
            order, place, clock = orders[rank], places[rank], clocks[rank]
            for operation in order[place:] if place else order:
                source = sources[operation]
                if source >= 0:
                    ready = ends[source]
                    if ready < 0:
                        waiting[source] = rank
                        break
                    ready += delays[operation]
                    if ready > clock:
                        clock = ready
                heads[operation] = clock
                clock += durations[operation]
                ends[operation] = clock
                sequence.append(operation)
                place += 1
                if waiting[operation] >= 0:
                    runnable.append(waiting[operation])
            places[rank], clocks[rank] = place, clock
        self._sequence = sequence
        self.makespan = max(clock + ending for clock, ending in zip(clocks, self.problem.endings, strict=True))
        return len(sequence) == self.num_operations

    def run_back(self) -> None:
        """Compute `tails`, after `run`."""
        durations, delays, targets, tails = self.durations, self.delays, self.targets, self.tails
        width, rank_of = self.problem.num_microbatches, self.problem.rank_of
        following = list(self.problem.endings)
        for operation in reversed(self._sequence):
            rank = rank_of[operation // (3 * width)]
            tail = following[rank]
            target = targets[operation]
            if target >= 0 and tails[target] + delays[target] > tail:
                tail = tails[target] + delays[target]
            tail += durations[operation]
            tails[operation] = following[rank] = tail


def find_whole_backwards(problem: SearchProblem, orders: Orders) -> frozenset[int]:
    """Return the stages whose I and W may be one full backward where they are neighbours, at no loss of time.

    A full backward sends its input gradient only at its end, so stages are tried one after another.
    """
    timing = Timing(problem)
    timing.run(orders)
    makespan, width = timing.makespan, problem.num_microbatches
    found = []
    for stage in range(problem.placement.num_stages):
        before = list(timing.delays)
        order = orders[problem.rank_of[stage]]
        for operation, following in pairwise(order):
            if operation // width == 3 * stage + 1 and following == operation + width:
                target = timing.targets[operation]
                if target >= 0:
                    timing.delays[target] += timing.durations[following]
        timing.run(orders)
        if timing.makespan > makespan:
            timing.delays = before
        else:
            found.append(stage)
    return frozenset(found)
