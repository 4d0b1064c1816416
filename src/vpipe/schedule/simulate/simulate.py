"""Run a schedule on paper: exact start and end of every action from costs.

Because every rank's order is fixed, and all messages of a directed link come from one rank, which sends them in the
order it makes them, no event queue is needed: each rank is run until it misses an input, and is taken up again when
that input arrives. The cost is linear in the number of actions. Computations and transfers overlap; a rank that sends
does not wait. Moves to host memory overlap with computations too, which take `move_share` of their time longer for it,
but for what is moved while the rank waits. The schedule must be legal (`validate`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from vpipe.errors import ScheduleError
from vpipe.schedule.action import MOVES, VERSION_MOVES, Action, Kind
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.simulate.costs import Costs, Hop

__all__ = ["Event", "Simulation", "simulate"]


class Event(NamedTuple):
    """One action with its start and end, in the unit of the costs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What every rank does when."""

    schedule: Schedule
    costs: Costs
    events: tuple[tuple[Event, ...], ...]
    """Per rank, in order; computations only."""
    moves: tuple[tuple[Event, ...], ...]
    """Per rank, in order: when its host link carried activations and weights."""

    @cached_property
    def makespan(self) -> float:
        """First start to last end over all ranks."""
        busy = [events for events in self.events if events]
        return max(events[-1].end for events in busy) - min(events[0].start for events in busy)

    @cached_property
    def hops(self) -> tuple[tuple[Hop, ...], tuple[Hop, ...]]:
        """What messages cost at each cut: `Costs.hops`."""
        return self.costs.hops(self.schedule.placement)

    @cached_property
    def work(self) -> tuple[float, ...]:
        """Time each rank computes."""
        return tuple(math.fsum(end - start for _, start, end in events) for events in self.events)

    @property
    def bubble_fraction(self) -> float:
        """Idle time inside the makespan, of all ranks' time: idle / (num_ranks x makespan).

        The *barrier* meaning: a rank that is done still waits for the last one.
        """
        return self._fraction(self.schedule.num_ranks * self.makespan)

    @property
    def span_bubble_fraction(self) -> float:
        """Idle time between each rank's own first start and last end, over the same num_ranks x makespan.

        The *span* meaning: what is left when the next batch may start on a rank as soon as that rank is done. The
        difference to `bubble_fraction` is the time before the ranks' first and after their last action.
        """
        return self._fraction(math.fsum(events[-1].end - events[0].start for events in self.events if events))

    def _fraction(self, available: float) -> float:
        total = self.schedule.num_ranks * self.makespan
        return max(0.0, available - math.fsum(self.work)) / total if total else 0.0

    @property
    def peak_activations(self) -> tuple[float, ...]:
        """Microbatches each rank holds at most, in whole-rank units."""
        return peak_activations(self.schedule)


def simulate(schedule: Schedule, costs: Costs | None = None, starts: Sequence[float] = ()) -> Simulation:
    """Return the start and end of every action of `schedule`.

    Without `costs`, each rank's share of forward, input gradient and weight gradient takes 1, all else 0. `starts` is
    when each rank may begin, as after an earlier batch; without it all begin at 0.

    Raises:
        ScheduleError: the costs do not fit the stages, or the ranks wait for each other.
    """
    costs = costs or Costs.from_rank_shares(schedule.placement)
    run = _Run(schedule, costs, starts or (0.0,) * schedule.num_ranks)
    runnable = list(range(schedule.num_ranks - 1, -1, -1))
    while runnable:
        runnable += run.advance(runnable.pop())
    run.check_finished()
    return Simulation(schedule, costs, tuple(map(tuple, run.events)), tuple(map(tuple, run.moves)))


class _Run:
    """The state of all ranks: what each has done, and when the inputs that were sent arrive."""

    def __init__(self, schedule: Schedule, costs: Costs, starts: Sequence[float]) -> None:
        stages, size = schedule.num_stages, schedule.num_stages * schedule.num_microbatches
        self.schedule = schedule
        self.events: list[list[Event]] = [[] for _ in schedule.orders]
        self.moves: list[list[Event]] = [[] for _ in schedule.orders]
        self._move_times = costs.move or (0.0,) * stages
        self._version_times = costs.move_versions or (0.0,) * stages
        self._fetched: dict[int, float] = {}
        self._back: dict[int, float] = {}  # when the weights that a microbatch uses are there again
        self._copied = [0.0] * stages  # when the newest weights may be replaced
        self._offloaded = [0.0] * len(schedule.orders)
        self._waited = list(starts)
        self._moving = [0.0] * len(schedule.orders)  # time of moves that no computation or wait has gone by beside
        self._move_share = costs.move_share
        self._handling = costs.handling
        self._durations = costs.durations(stages)
        self._again = self._recomputed_in_backwards(costs)
        self._hops_forward, self._hops_backward = costs.hops(schedule.placement)
        self._rank_of = [schedule.position_of(stage) for stage in range(stages)]
        # When the input of a forward / backward is there, at stage * num_microbatches + microbatch; None: not sent yet.
        width = schedule.num_microbatches
        self._inputs: list[float | None] = [0.0] * width + [None] * (size - width)
        self._gradients: list[float | None] = [None] * (size - width) + [0.0] * width
        self._missing: list[int | None] = [None] * len(schedule.orders)  # what a rank waits for; gradients as ~index
        self._link_free: dict[tuple[int, int], float] = {}

    def _recomputed_in_backwards(self, costs: Costs) -> list[float] | None:
        """Return how much longer each backward takes; nothing where its recomputation is an action of its own."""
        if not any(costs.recompute):
            return None
        width = self.schedule.num_microbatches
        extra = [time for time in costs.recompute for _ in range(width)]
        for order in self.schedule.orders:
            for action in order:
                if action.kind is Kind.R:
                    extra[action.stage * width + action.microbatch] = 0.0
        return extra

    def advance(self, rank: int) -> list[int]:
        """Run `rank` until it is done or misses an input; return the ranks that its messages set free."""
        order, events, missing = self.schedule.orders[rank], self.events[rank], self._missing
        inputs, gradients, durations = self._inputs, self._gradients, self._durations
        width, last = self.schedule.num_microbatches, self.schedule.num_stages - 1
        forward, backward, input_backward, again = Kind.F, Kind.B, Kind.I, self._again
        moves, fetched, back, moving = self.moves[rank], self._fetched, self._back, self._moving
        clock = max(events[-1].end, self._waited[rank]) if events else self._waited[rank]
        freed = []
        missing[rank] = None
        for position in range(len(events) + len(moves), len(order)):
            action = order[position]
            kind, stage = action.kind, action.stage
            index = stage * width + action.microbatch
            goes_back = kind is backward or kind is input_backward
            if kind is forward:
                ready = inputs[index]
            elif goes_back:
                ready = gradients[index]
            elif kind in MOVES:
                clock = self._move(rank, action, index, clock)
                continue
            else:
                ready = self._copied[stage] if kind is Kind.STEP else clock
            if ready is None:
                missing[rank] = ~index if goes_back else index
                break
            if goes_back and index in fetched and fetched[index] > ready:
                ready = fetched[index]
            if back and kind is not Kind.STEP and back.get(index, 0.0) > ready:
                ready = back[index]
            start = ready if ready > clock else clock
            clock = start + durations[kind][stage]
            if goes_back and again is not None:
                clock += again[index]
            if moving[rank] and self._move_share:
                clock += self._lost(rank, start)
            events.append(Event(action, start, clock))
            if kind is forward and stage < last:
                receiver, index = self._rank_of[stage + 1], index + width
                hop = self._hops_forward[stage]
                inputs[index] = clock if receiver == rank else self._arrival(rank, receiver, hop, clock)
            elif goes_back and stage > 0:
                receiver, index = self._rank_of[stage - 1], index - width
                hop = self._hops_backward[stage - 1]
                gradients[index] = clock if receiver == rank else self._arrival(rank, receiver, hop, clock)
                index = ~index
            else:
                continue
            if missing[receiver] == index:
                missing[receiver] = None
                freed.append(receiver)
        return freed

    def _move(self, rank: int, action: Action, index: int, clock: float) -> float:
        """Put a move on the rank's host link, after those before it; return when the rank goes on."""
        moves, kind, stage = self.moves[rank], action.kind, action.stage
        if kind is Kind.OFFLOAD:
            # One at a time, or several microbatches would wait on the device to get out.
            clock = max(clock, self._offloaded[rank])
        start = max(clock, moves[-1].end) if moves else clock
        if self._handling:
            start, duration = clock, self._handling[kind][stage]
        else:
            duration = (self._version_times if kind in VERSION_MOVES else self._move_times)[stage]
        end = start + duration
        self._moving[rank] += duration
        moves.append(Event(action, start, end))
        if kind is Kind.FETCH:
            self._fetched[index] = end
        elif kind is Kind.FETCH_V:
            self._back[index] = end
        elif kind is Kind.OFFLOAD_V:
            self._copied[stage] = end
        else:
            self._offloaded[rank] = end
        if self._handling:
            clock = end
        self._waited[rank] = clock
        return clock

    def _lost(self, rank: int, start: float) -> float:
        """Return how much longer a computation takes for the moves since the one before it, less the wait between."""
        events = self.events[rank]
        waited = start - events[-1].end if events else 0.0
        moving, self._moving[rank] = self._moving[rank], 0.0
        return self._move_share * max(0.0, moving - waited)

    def _arrival(self, sender: int, receiver: int, hop: Hop, ready: float) -> float:
        if hop.occupied:
            link = (sender, receiver)
            ready = max(ready, self._link_free.get(link, 0.0)) + hop.occupied
            self._link_free[link] = ready
        return ready + hop.latency

    def check_finished(self) -> None:
        """Raise when ranks are left waiting."""
        orders = self.schedule.orders
        waits = [
            f"rank {rank} at {order[len(done) + len(moved)]}"
            for rank, (order, done, moved) in enumerate(zip(orders, self.events, self.moves, strict=True))
            if len(done) + len(moved) < len(order)
        ]
        if waits:
            raise ScheduleError(
                f"schedule '{self.schedule.name}' never ends, ranks wait for each other: {', '.join(waits[:8])}; "
                "validate_schedule shows why"
            )
