"""What a rank did and when: events, and the recorder that an executor calls after each action."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vpipe.schedule.action import Action, Kind

__all__ = ["TraceEvent", "TraceRecorder"]

_WAITS = frozenset({Kind.RECV_F, Kind.RECV_B})
_MAX_EVENTS = 200_000


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """One action that a rank ran: its time in ns on a clock that all ranks share, and how much of it was waiting."""

    rank: int
    action: Action
    iteration: int
    start_ns: int
    end_ns: int
    wait_ns: int = 0
    """Time during which the rank waited for others; drawn as if it was at the start of the action."""

    @property
    def duration_ns(self) -> int:
        """Return the time from start to end."""
        return self.end_ns - self.start_ns

    @property
    def work_ns(self) -> int:
        """Return the time that was not waiting."""
        return self.duration_ns - self.wait_ns


class TraceRecorder:
    """Keeps the latest `max_events` actions of this rank; pass it to the executor as its record.

    `iteration` tells the number of batches done when the program that runs was started; a program of several batches
    numbers its microbatches through. Times come from `time.perf_counter_ns` and are moved to the wall clock, which
    machines share as well as they are synchronised.
    """

    def __init__(
        self, rank: int, num_microbatches: int, iteration: Callable[[], int], max_events: int = _MAX_EVENTS
    ) -> None:
        self._rank = rank
        self._num_microbatches = num_microbatches
        self._iteration = iteration
        self._rows: deque[tuple[Action, int, int, int, int]] = deque(maxlen=max_events)
        self._waited_ns = 0
        self._to_wall_clock_ns = _wall_clock_shift_ns()
        self.enabled = True
        """Set to False for actions that are not part of the training, such as an evaluation's."""

    def __call__(self, action: Action, start_ns: int, end_ns: int) -> None:
        """Record one action; this is on the path of every action, so it only keeps what it gets."""
        if self.enabled:
            wait_ns = end_ns - start_ns if action.kind in _WAITS else self._waited_ns
            self._rows.append((action, self._iteration(), start_ns, end_ns, wait_ns))
        self._waited_ns = 0

    def waited(self, duration_ns: int) -> None:
        """Say that of the action that runs now this was waiting for other ranks, as in an update's all-reduce.

        Receives need not say so: all of their time is waiting.
        """
        self._waited_ns += duration_ns

    def events(self) -> list[TraceEvent]:
        """Return what was recorded, in the order in which it was done."""
        shift = self._to_wall_clock_ns
        return [
            TraceEvent(
                self._rank,
                action,
                first + action.microbatch // self._num_microbatches,
                start + shift,
                end + shift,
                wait,
            )
            for action, first, start, end, wait in self._rows
        ]


def _wall_clock_shift_ns(num_readings: int = 5) -> int:
    """Return what to add to `time.perf_counter_ns` for the wall clock.

    A process that is paused between two readings of the clocks would be off by that; the closest readings count.
    """
    readings = []
    for _ in range(num_readings):
        before, wall, after = time.perf_counter_ns(), time.time_ns(), time.perf_counter_ns()
        readings.append((after - before, wall - (before + after) // 2))
    return min(readings)[1]
