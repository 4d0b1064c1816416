"""Traces of a made-up executor, whose every cost is known: what measuring and predicting have to find again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vpipe.runtime.trace import TraceEvent
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.passes.lower import counterpart, lower
from vpipe.schedule.schedule import Schedule


@dataclass(frozen=True)
class Executor:
    """Times in ms; `work` by stage and kind, 1 where nothing is given."""

    work: Mapping[tuple[int, Kind], float] = field(default_factory=dict)
    gap: float = 0.0
    send: float = 0.0
    receive: float = 0.0
    """To take a message; while it waits for one, only `receive` after the arrival."""
    latency: float = 0.0
    occupied: float = 0.0
    turn: float = 0.0
    tell: float | None = None
    """From the last stage's rank's end of a batch to the start of the next one elsewhere."""
    meet: float | None = None

    def run(self, schedule: Schedule, num_batches: int, num_microbatches: int) -> list[TraceEvent]:
        """Run a synchronous schedule so many times, or one long asynchronous one; batches count from 0."""
        if not schedule.synchronous:
            rows = self._batch(schedule, [0.0] * schedule.num_ranks)
            return [
                _event(rank, action, action.microbatch // num_microbatches, *times)
                for rank, row in enumerate(rows)
                for action, *times in row
            ]
        events, starts = [], [0.0] * schedule.num_ranks
        teller = schedule.position_of(schedule.num_stages - 1)
        for batch in range(num_batches):
            rows = self._batch(schedule, starts)
            events += [_event(rank, action, batch, *times) for rank, row in enumerate(rows) for action, *times in row]
            known = rows[teller][-1][2] + (self.tell or 0.0)
            starts = [
                row[-1][2] + self.turn if self.tell is None or rank == teller else max(row[-1][2] + self.turn, known)
                for rank, row in enumerate(rows)
            ]
        return events

    def _batch(self, schedule: Schedule, starts: Sequence[float]) -> list[list[tuple[Action, float, float, float]]]:
        orders, clocks = lower(schedule), list(starts)
        rows: list[list[tuple[Action, float, float, float]]] = [[] for _ in orders]
        arrivals: dict[Action, float] = {}
        free: defaultdict[tuple[int, int], float] = defaultdict(float)
        while any(len(row) < len(order) for row, order in zip(rows, orders, strict=True)):
            for rank, order in enumerate(orders):
                while len(rows[rank]) < len(order):
                    action, clock = order[len(rows[rank])], clocks[rank]
                    end = clock + self.work.get((action.stage, action.kind), 1.0)
                    if action.kind in (Kind.RECV_F, Kind.RECV_B):
                        if counterpart(action) not in arrivals:
                            break
                        end = max(clock, arrivals[counterpart(action)]) + self.receive
                    elif action.kind in (Kind.SEND_F, Kind.SEND_B):
                        end = clock + self.send
                        link = rank, schedule.rank_of(counterpart(action))
                        free[link] = max(free[link], end) + self.occupied
                        arrivals[action] = free[link] + self.latency
                    rows[rank].append((action, clock, end, 0.0))
                    after_update = action.kind is Kind.STEP and not schedule.synchronous
                    clocks[rank] = end + (self.turn if after_update else self.gap)
        return self._met(rows) if self.meet is not None else rows

    def _met(
        self, rows: list[list[tuple[Action, float, float, float]]]
    ) -> list[list[tuple[Action, float, float, float]]]:
        """Let each rank's last update wait for all, and take `meet` more for the meeting."""
        together = max(row[-1][1] for row in rows) + (self.meet or 0.0)
        for row in rows:
            action, start, end, _ = row[-1]
            row[-1] = action, start, together + end - start, together - start
        return rows


def _event(rank: int, action: Action, iteration: int, start: float, end: float, wait: float) -> TraceEvent:
    return TraceEvent(rank, action, iteration, round(start * 1e6), round(end * 1e6), round(wait * 1e6))
