"""Where the ranks' time went: work, waiting, idling, from measured actions.

Bubble fractions are those of the simulator (`vpipe.schedule.simulate.simulate`), with measured times: idle time over
``num_ranks x makespan``, where the *barrier* form counts a rank as idle from the first start to the last end over all
ranks, and the *span* form from its own first start to its own last end. Work is forwards, backwards and updates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vpipe.runtime.trace import TraceEvent
from vpipe.schedule.action import COMPUTE, Kind

__all__ = ["PipelineTimes", "RankWork", "StageWork", "between_iterations", "clip_events", "measure_pipeline"]


@dataclass(frozen=True)
class RankWork:
    """One rank's share of the makespan."""

    rank: int
    busy_ms: float
    """Time it computed."""
    waiting_ms: float
    """Time it waited for messages."""
    span_ms: float
    """Its own first start to last end."""


@dataclass(frozen=True)
class StageWork:
    """Mean times of one stage, for one microbatch or one update; 0 where there was none."""

    stage: int
    rank: int
    forward_ms: float
    backward_ms: float
    """All of the backward: inputs, weights, and what was recomputed for it."""
    update_ms: float


@dataclass(frozen=True)
class PipelineTimes:
    """Where the time of all ranks went, from the first start to the last end."""

    makespan_ms: float
    ranks: tuple[RankWork, ...]
    stages: tuple[StageWork, ...]

    @property
    def bubble_fraction(self) -> float:
        """Time in which ranks did not compute, of all ranks' time (barrier form)."""
        return self._share(len(self.ranks) * self.makespan_ms - sum(rank.busy_ms for rank in self.ranks))

    @property
    def span_bubble_fraction(self) -> float:
        """The same between each rank's own first start and last end (span form)."""
        return self._share(sum(rank.span_ms - rank.busy_ms for rank in self.ranks))

    @property
    def communication_share(self) -> float:
        """Time in which ranks waited for messages, of all ranks' time; the schedule's bubble is most of it, or all."""
        return self._share(sum(rank.waiting_ms for rank in self.ranks))

    def _share(self, time_ms: float) -> float:
        total = len(self.ranks) * self.makespan_ms
        return max(0.0, time_ms) / total if total else 0.0


def measure_pipeline(events: Iterable[TraceEvent]) -> PipelineTimes:
    """Add up the events of all ranks; give those of one iteration, or of any stretch of a run."""
    by_rank: dict[int, list[TraceEvent]] = defaultdict(list)
    by_stage: dict[int, list[TraceEvent]] = defaultdict(list)
    for event in events:
        by_rank[event.rank].append(event)
        by_stage[event.action.stage].append(event)
    start = min((event.start_ns for group in by_rank.values() for event in group), default=0)
    end = max((event.end_ns for group in by_rank.values() for event in group), default=0)
    return PipelineTimes(
        (end - start) / 1e6,
        tuple(_rank_times(rank, by_rank[rank]) for rank in sorted(by_rank)),
        tuple(_stage_times(stage, by_stage[stage]) for stage in sorted(by_stage)),
    )


def clip_events(events: Iterable[TraceEvent], start_ns: int, end_ns: int) -> list[TraceEvent]:
    """Return what happened between two times; of an action that crosses one of them, the part inside."""
    clipped = []
    for event in events:
        start, end = max(event.start_ns, start_ns), min(event.end_ns, end_ns)
        if start < end:
            wait = min(max(event.start_ns + event.wait_ns, start), end) - start
            clipped.append(replace(event, start_ns=start, end_ns=end, wait_ns=wait))
    return clipped


def between_iterations(events: Sequence[TraceEvent], first: int, stop: int) -> list[TraceEvent]:
    """Return what happened from the start of iteration `first` to that of iteration `stop`, on all ranks.

    The cuts are in time: in an asynchronous run, what other ranks do of neighbouring iterations meanwhile counts. Where
    nothing of `stop` was recorded, everything from the start on is returned.
    """
    end = _start(events, stop)
    if end is None:
        end = max((event.end_ns for event in events), default=0)
    start = _start(events, first)
    return clip_events(events, end if start is None else start, end)


def _start(events: Sequence[TraceEvent], iteration: int) -> int | None:
    """Return when the first rank began to compute an iteration; others may have waited for it long before."""
    starts = (event.start_ns for event in events if event.iteration == iteration and event.action.kind in COMPUTE)
    return min(starts, default=None)


def _rank_times(rank: int, events: Sequence[TraceEvent]) -> RankWork:
    span = max(event.end_ns for event in events) - min(event.start_ns for event in events)
    busy = sum(event.work_ns for event in events if event.action.kind in COMPUTE)
    return RankWork(rank, busy / 1e6, sum(event.wait_ns for event in events) / 1e6, span / 1e6)


def _stage_times(stage: int, events: Sequence[TraceEvent]) -> StageWork:
    total: dict[Kind, int] = defaultdict(int)
    count: dict[Kind, int] = defaultdict(int)
    for event in events:
        total[event.action.kind] += event.work_ns
        count[event.action.kind] += 1
    backward = total[Kind.B] + total[Kind.I] + total[Kind.W] + total[Kind.R]
    return StageWork(
        stage,
        events[0].rank,
        _mean_ms(total[Kind.F], count[Kind.F]),
        _mean_ms(backward, count[Kind.B] + count[Kind.I]),
        _mean_ms(total[Kind.STEP], count[Kind.STEP]),
    )


def _mean_ms(total_ns: int, count: int) -> float:
    return total_ns / count / 1e6 if count else 0.0
