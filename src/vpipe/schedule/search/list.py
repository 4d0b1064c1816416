"""List scheduling: run all ranks at once and let each take, whenever it is free, the best action that is there.

What "best" means is a `ListPolicy`: which letter goes first, how many microbatches a stage may have between forward and
input gradient, and how long a rank would rather wait for an input that is under way than start a weight gradient.
Weight gradients fill what is left, or come when memory asks for one. Memory never blocks for good: of the room on a
rank, the stages that come later in the model keep one microbatch each for themselves.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush

from vpipe.schedule.search.problem import Orders, SearchProblem

__all__ = ["ListPolicy", "build_list_order"]

_NEVER = 1 << 62


@dataclass(frozen=True)
class ListPolicy:
    """How ranks choose."""

    priority: tuple[int, ...]
    """Per letter (``3 x stage + kind``): the smallest goes first. Of W, for those that memory asks for."""
    in_flight: tuple[int, ...]
    """Per stage: microbatches that are forward and not yet back, at most."""
    patience: tuple[float, ...]
    """Per rank, as a share of a weight gradient: an input that comes within it is waited for."""


def build_list_order(problem: SearchProblem, policy: ListPolicy) -> Orders | None:
    """Return the orders that `policy` leads to, or None if ranks end up waiting for each other.

    They can only where a link carries messages for several stages: one that finds no memory stops those behind it.
    """
    return _Run(problem, policy).run()


class _Run:
    """The state of all ranks at one moment."""

    def __init__(self, problem: SearchProblem, policy: ListPolicy) -> None:
        stages, width = problem.placement.num_stages, problem.num_microbatches
        self._problem = problem
        self._policy = policy
        self._last = stages - 1
        # When the next inputs of a letter are there, oldest first; only what was started so far.
        self._arrivals: list[list[int]] = [[] for _ in range(3 * stages)]
        self._arrivals[0] = [0] * width
        self._done = [0] * (3 * stages)
        self._orders: Orders = [[] for _ in problem.capacity]
        self._free = [0] * len(problem.capacity)  # when a rank ends what it does
        self._wakes: list[tuple[int, int]] = []
        self._letters = [
            sorted((3 * stage + kind for stage in own for kind in range(3)), key=policy.priority.__getitem__)
            for own in problem.stages_of
        ]
        # A link hands messages of one kind over in the order they were sent, whatever stages they are for.
        self._queues = _shared_links(problem)

    def run(self) -> Orders | None:
        wakes, free = self._wakes, self._free
        for rank in range(len(free)):
            heappush(wakes, (0, rank))
        while wakes:
            now, rank = heappop(wakes)
            if free[rank] <= now:
                letter = self._choose(rank, now)
                if letter >= 0:
                    self._start(rank, letter, now)
        width = self._problem.num_microbatches
        return self._orders if all(done == width for done in self._done) else None

    def _choose(self, rank: int, now: int) -> int:
        """Return the letter that `rank` takes now, or -1 to wait."""
        done, arrivals, width = self._done, self._arrivals, self._problem.num_microbatches
        in_flight, queues = self._policy.in_flight, self._queues
        chosen = best_weight = -1
        coming = _NEVER  # when the next input comes that the rank could use
        blocked = False  # a forward is there and memory is not
        for letter in self._letters[rank]:
            stage, kind = divmod(letter, 3)
            count = done[letter]
            if kind == 2:
                if best_weight < 0 and count < done[letter - 1]:
                    best_weight = letter
                continue
            times = arrivals[letter]
            if count >= len(times) or (letter in queues and queues[letter][0] != letter):
                continue
            if kind == 0:
                if count >= width or count - done[letter + 1] >= in_flight[stage]:
                    continue
                if not self._has_room(rank, stage):
                    blocked = blocked or times[count] <= now
                    continue
            if times[count] <= now:
                chosen = letter
                break
            coming = min(coming, times[count])
        if chosen >= 0:
            return chosen
        if best_weight < 0:
            return -1
        if blocked:
            return best_weight
        wait = self._policy.patience[rank] * self._problem.durations[best_weight]
        return -1 if coming - now < wait else best_weight

    def _has_room(self, rank: int, stage: int) -> bool:
        """Return whether one more microbatch of `stage` leaves the later stages of the rank their own."""
        own, done = self._problem.stages_of[rank], self._done
        room = self._problem.capacity[rank] - len(own) + 1
        held = 0
        for turn, other in enumerate(own):
            held += done[3 * other] - done[3 * other + 2]
            if other >= stage and held >= room + turn:
                return False
        return True

    def _start(self, rank: int, letter: int, now: int) -> None:
        problem = self._problem
        stage, kind = divmod(letter, 3)
        end = now + problem.durations[letter]
        self._orders[rank].append(letter * problem.num_microbatches + self._done[letter])
        self._done[letter] += 1
        if letter in self._queues:
            self._queues[letter].popleft()
        self._free[rank] = end
        heappush(self._wakes, (end, rank))
        if kind == 0:
            target, lag = (letter + 3, problem.lags[0][stage]) if stage < self._last else (letter + 1, 0)
        elif kind == 1 and stage:
            target, lag = letter - 3, problem.lags[1][stage - 1]
        else:
            return
        self._arrivals[target].append(end + lag)
        if target in self._queues:
            self._queues[target].append(target)
        receiver = problem.rank_of[target // 3]
        if receiver != rank:
            heappush(self._wakes, (end + lag, receiver))


def _shared_links(problem: SearchProblem) -> dict[int, deque[int]]:
    """Return, for letters whose inputs share a link with others of their kind, the queue of what was sent over it."""
    letters: dict[tuple[int, tuple[int, int]], list[int]] = {}
    for letter, (link, _) in enumerate(problem.channels):
        if link is not None:
            letters.setdefault((letter % 3, link), []).append(letter)
    queues: dict[int, deque[int]] = {}
    for sharing in letters.values():
        if len(sharing) > 1:
            queue: deque[int] = deque()
            queues |= dict.fromkeys(sharing, queue)
    return queues
