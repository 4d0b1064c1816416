"""Why ranks idle: every moment of a rank that computes nothing, put down to one cause.

A rank idles because it waits for an input. Asking what that input was waiting for, and so on, ends at a message under
way, or at a rank that was at work on something else:

- **communication**: the message was under way, or queued behind others on its link.
- **host**: activations or weights were on the link to host memory.
- **step**: the rank at work was updating its weights.
- **warmup**: it was at other work, and the idle rank had not begun its first backward yet: the pipeline fills.
- **cooldown**: likewise, after the idle rank's last forward: the pipeline drains. After a rank's last action it waits,
  as an update that is a barrier does, for the rank that ends last.
- **imbalance**: likewise, in between: stages of unequal time, or an order that does not fit the times.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter

from vpipe.schedule.action import Kind
from vpipe.schedule.simulate.phases import turning_points
from vpipe.schedule.simulate.simulate import Event, Simulation

__all__ = ["CAUSES", "idle_times"]

CAUSES = ("warmup", "cooldown", "imbalance", "communication", "host", "step")

_Piece = tuple[float, float, str]
"""Start, end, and the cause; an empty cause stands for the phase of whoever waits."""


def idle_times(simulation: Simulation) -> tuple[dict[str, float], ...]:
    """Return, for each rank, its idle time between the first start and the last end of all ranks, by cause.

    The causes are those of `CAUSES`; together they are what `bubble_fraction` counts. Unit: that of the costs.
    """
    return _Explainer(simulation).explain()


@dataclass
class _Wait:
    """A gap of `rank`, and the rank whose result ended it."""

    rank: int
    start: float
    end: float
    sender: int
    sent: float
    """From when on the message was under way or queued."""
    phase: str
    transport: str = "communication"
    """What carried what was waited for."""


class _Explainer:
    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._events = simulation.events
        self._steps = [_steps(events) for events in self._events]
        self._pieces: list[list[_Piece]] = [[] for _ in self._events]  # the idle time explained so far, in order

    def explain(self) -> tuple[dict[str, float], ...]:
        busy = [events for events in self._events if events]
        if not busy:
            return tuple(dict.fromkeys(CAUSES, 0.0) for _ in self._events)
        last = max(range(len(self._events)), key=lambda rank: self._events[rank][-1].end if self._events[rank] else 0.0)
        end = self._events[last][-1].end
        sums: list[dict[str, list[float]]] = [{cause: [] for cause in CAUSES} for _ in self._events]
        # What ends first is explained first, so whatever a wait asks about is explained already.
        for wait in sorted(self._waits(), key=lambda wait: wait.end):
            self._add(wait, sums[wait.rank])
        for rank, events in enumerate(self._events):
            if events and events[-1].end < end:
                self._add(_Wait(rank, events[-1].end, end, last, end, "cooldown"), sums[rank])
        return tuple({cause: math.fsum(parts) for cause, parts in rank.items()} for rank in sums)

    def _add(self, wait: _Wait, sums: dict[str, list[float]]) -> None:
        for start, end, cause in self._explain(wait):
            self._pieces[wait.rank].append((start, end, cause))
            sums[cause or wait.phase].append(end - start)

    def _explain(self, wait: _Wait) -> Iterator[_Piece]:
        """Cut a gap into pieces: what the sender idled for, its updates, its other work, then the message."""
        at, until = wait.start, min(wait.sent, wait.end)
        for start, end, cause in self._sender_pieces(wait.sender, wait.start, until):
            if start > at:
                yield at, start, ""
            yield max(start, at), min(end, until), cause
            at = min(end, until)
        if until > at:
            yield at, until, ""
        if wait.end > max(wait.start, until):
            yield max(wait.start, until), wait.end, wait.transport

    def _sender_pieces(self, sender: int, start: float, end: float) -> list[_Piece]:
        """Return the idle times and updates of `sender` within a stretch of time, in order."""
        found: list[_Piece] = []
        for pieces in (self._pieces[sender], self._steps[sender]):
            index = bisect_right(pieces, start, key=itemgetter(1))  # the first that ends after `start`
            while index < len(pieces) and pieces[index][0] < end:
                found.append(pieces[index])
                index += 1
        return sorted(found)

    def _waits(self) -> Iterator[_Wait]:
        schedule = self._simulation.schedule
        width, ranks = schedule.num_microbatches, [schedule.position_of(stage) for stage in range(schedule.num_stages)]
        forward_ends, backward_ends = _ends(self._simulation)
        for rank, events in enumerate(self._events):
            moved = {move.end for move in self._simulation.moves[rank]}
            first_backward, last_forward = turning_points(events)
            clock = 0.0
            for index, (action, start, end) in enumerate(events):
                if start > clock:
                    if start in moved:
                        yield _Wait(rank, clock, start, rank, clock, "", "host")
                        clock = end
                        continue
                    phase = "warmup" if index <= first_backward else "cooldown" if index > last_forward else "imbalance"
                    forward = action.kind is Kind.F
                    source = action.stage + (-1 if forward else 1)
                    sent = (forward_ends if forward else backward_ends)[source * width + action.microbatch]
                    yield _Wait(rank, clock, start, ranks[source], sent, phase)
                clock = end


def _ends(simulation: Simulation) -> tuple[list[float], list[float]]:
    """Return when each forward, and each input gradient, ends: at ``stage * num_microbatches + microbatch``."""
    width = simulation.schedule.num_microbatches
    forwards = [0.0] * (simulation.schedule.num_stages * width)
    backwards = forwards.copy()
    for events in simulation.events:
        for action, _, end in events:
            if action.kind is Kind.F:
                forwards[action.stage * width + action.microbatch] = end
            elif action.kind in (Kind.B, Kind.I):
                backwards[action.stage * width + action.microbatch] = end
    return forwards, backwards


def _steps(events: tuple[Event, ...]) -> list[_Piece]:
    return [(start, end, "step") for action, start, end in events if action.kind is Kind.STEP and end > start]
