"""What the makespan consists of: the chain of actions and transfers in which each starts the moment the last ends."""

from __future__ import annotations

from bisect import bisect_right

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.simulate.simulate import Event, Simulation
from vpipe.schedule.simulate.transfers import Transfer, transfers_of

__all__ = ["critical_path"]


def critical_path(simulation: Simulation) -> tuple[Event, ...]:
    """Return the chain of events that makes the makespan as long as it is, first to last.

    Each event starts exactly when the one before it ends, and the last ends last of all. Transfers that take time are
    `SEND_F` and `SEND_B` events; one that waits for its link is preceded by the transfer that keeps the link busy, up
    to the moment when it leaves the link free. What a rank waits for on its host link are `OFFLOAD` and `FETCH` events.
    """
    return tuple(reversed(_Tracer(simulation).trace()))


class _Tracer:
    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._schedule = simulation.schedule
        self._events = simulation.events
        self._messages: dict[tuple[int, int], list[Transfer]] = {}

    def trace(self) -> list[Event]:
        """Walk back from the last end."""
        rank = max(range(len(self._events)), key=lambda rank: self._events[rank][-1].end if self._events[rank] else 0.0)
        index = len(self._events[rank]) - 1
        path: list[Event] = []
        while True:
            event = self._events[rank][index]
            path.append(event)
            if index and self._events[rank][index - 1].end == event.start:
                index -= 1
                continue
            if event.start == 0:
                return path
            if moves := self._moves_until(rank, event.start):
                path += moves
                index = bisect_right(self._events[rank], moves[-1].start, key=lambda other: other.end) - 1
                continue
            receiver = rank
            rank, index = self._producer(event)
            if rank != receiver:
                index = self._trace_transfer(path, rank, index, receiver, event.start)

    def _moves_until(self, rank: int, time: float) -> list[Event]:
        """Return the moves on the host link that end at `time` without a gap, last to first."""
        found: list[Event] = []
        for move in reversed(self._simulation.moves[rank]):
            if move.end == (found[-1].start if found else time) and move.end > move.start:
                found.append(move)
        return found

    def _producer(self, event: Event) -> tuple[int, int]:
        """Find the computation on another stage whose result `event` waited for."""
        stage, microbatch = event.action.stage, event.action.microbatch
        forward = event.action.kind is Kind.F
        stage += -1 if forward else 1
        wanted = [Action(stage, kind, microbatch) for kind in ((Kind.F,) if forward else (Kind.B, Kind.I))]
        rank = self._schedule.rank_of(wanted[0])
        events = self._events[rank]
        index = bisect_right(events, event.start, key=lambda other: other.start) - 1
        while events[index].action not in wanted:
            index -= 1
        return rank, index

    def _trace_transfer(self, path: list[Event], rank: int, index: int, receiver: int, arrival: float) -> int:
        """Add the transfer of a result, and those that kept its link busy; return what the first of them waited for."""
        if (rank, receiver) not in self._messages:
            for message in transfers_of(self._simulation, rank):
                self._messages.setdefault((rank, message.receiver), []).append(message)
        messages = self._messages[rank, receiver]
        number = bisect_right(messages, index, key=lambda message: message.producer) - 1
        end = arrival
        while True:
            message = messages[number]
            if end > message.start:
                path.append(Event(message.action, message.start, end))
            if message.start == self._events[rank][message.producer].end:
                return message.producer
            end, number = message.start, number - 1
