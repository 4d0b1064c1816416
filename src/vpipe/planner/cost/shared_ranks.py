"""Ranks with several stages: the fastest policies for all stages of a rank together, under the rank's limit.

Stages of a rank share its memory and its time, so neither a stage's peak nor its time counts by itself. The ways of
running each stage come from the same frontiers as where it is alone. Ways of one stage are combined with those of the
next, and what cannot fit any more is dropped; of very many combinations a spread of fast and small ones is kept, so the
best may be missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from vpipe.plan.partition import Partition
from vpipe.plan.policy import Policy
from vpipe.planner.cost.costs import Array, ChainCosts
from vpipe.planner.cost.loads import StageLoad
from vpipe.planner.cost.policies import Frontiers, StageFit
from vpipe.planner.cost.rank_moments import RankMoments, rank_moments
from vpipe.schedule.schedule import Schedule

__all__ = ["Interval", "RankWay", "SharedRanks"]

_MOST_WAYS = 128
"""Ways of one stage, and of several together, that are combined with those of the next stage."""

Interval = tuple[int, int]
"""The first block of a stage, and the one after its last."""


@dataclass(frozen=True)
class RankWay:
    """One way of running all stages of a rank."""

    busy_ms: float
    """The longest that the rank, its host link or a link to a neighbour takes for a microbatch of all its stages."""
    num_bytes: float
    """At the rank's peak."""
    policies: tuple[tuple[Policy, ...], ...]
    """Of the blocks of each of its stages."""


@dataclass(frozen=True)
class _Ways:
    """Ways of one stage, or of several: a column each."""

    busy: Array
    host: Array
    held: Array
    """Bytes at every moment."""
    rows: NDArray[np.intp]
    """[i, j]: which way of its frontier stage i takes in way j."""
    alike: NDArray[np.intp]
    """For each policy, the column where all blocks have it, or what needs no more; -1 where that is gone."""

    def select(self, columns: NDArray[np.intp]) -> _Ways:
        """Return some of them."""
        places = np.full(len(self.busy) + 1, -1)
        places[columns] = np.arange(len(columns))
        held, rows = self.held[:, columns], self.rows[:, columns]
        return _Ways(self.busy[columns], self.host[columns], held, rows, places[self.alike])

    def thin(self, peaks: Array) -> _Ways:
        """Keep a spread of those that are fast for their `peaks`, and those that are alike."""
        if len(self.busy) <= _MOST_WAYS:
            return self
        order = np.lexsort((peaks, self.busy + self.host))
        lowest = np.minimum.accumulate(peaks[order])
        front = order[np.flatnonzero(np.concatenate([[True], lowest[1:] < lowest[:-1]]))]
        if len(front) > _MOST_WAYS:
            front = front[np.linspace(0, len(front) - 1, _MOST_WAYS).round().astype(int)]
        spread = order[np.linspace(0, len(order) - 1, _MOST_WAYS - len(front)).round().astype(int)]
        return self.select(np.unique(np.concatenate([front, spread, self.alike[self.alike >= 0]])))


class SharedRanks:
    """What cuts of a chain make of ranks with several stages, without a limit and with one."""

    def __init__(
        self,
        frontiers: Frontiers,
        schedule: Schedule,
        loads: Sequence[StageLoad],
        speeds: Sequence[float],
        updates: float,
    ) -> None:
        """Use `loads` and `speeds` of every stage, and `updates` that come with every microbatch."""
        self.frontiers = frontiers
        self.schedule = schedule
        self.loads = tuple(loads)
        self.speeds = tuple(speeds)
        self.updates = updates
        self._keeping = Frontiers(frontiers.chain, (Policy.KEEP,))
        self._moments: dict[int, tuple[RankMoments, list[StageFit]]] = {}
        self._parts: dict[tuple[int, int, int, bool], _Ways] = {}
        self._found: dict[tuple[int, tuple[Interval, ...], float], RankWay | None] = {}
        self._smallest: dict[tuple[int, tuple[Interval, ...]], RankWay] = {}

    @property
    def chain(self) -> ChainCosts:
        """Costs of the blocks."""
        return self.frontiers.chain

    def intervals(self, partition: Sequence[int]) -> list[tuple[Interval, ...]]:
        """Return the blocks of each stage of every rank."""
        cuts = list(Partition(partition).ranges)
        return [tuple(cuts[stage] for stage in stages) for stages in self.stages]

    def fastest(self, rank: int, intervals: tuple[Interval, ...], limit: float) -> RankWay | None:
        """Return the fastest way found within a limit; None where there is none."""
        key = rank, intervals, limit
        if key not in self._found:
            kept = self._combine(rank, intervals, limit, keeping=True)
            ways = kept or self._combine(rank, intervals, limit, keeping=False)
            self._found[key] = None
            if ways is not None:
                self._found[key] = self._best(intervals, ways, np.zeros(len(ways.busy)), keeping=ways is kept)
        return self._found[key]

    def smallest(self, rank: int, intervals: tuple[Interval, ...]) -> RankWay:
        """Return the way with the least bytes found, whatever time it takes."""
        key = rank, intervals
        if key not in self._smallest:
            ways = self._combine(rank, intervals, np.inf, keeping=False)
            assert ways is not None  # without a limit everything fits
            self._smallest[key] = self._best(intervals, ways, ways.held.max(axis=0), keeping=False)
        return self._smallest[key]

    @cached_property
    def stages(self) -> list[tuple[int, ...]]:
        """Those of every rank."""
        return [self.schedule.placement.stages_of(rank) for rank in range(self.schedule.num_ranks)]

    def _rank(self, rank: int) -> tuple[RankMoments, list[StageFit]]:
        if rank not in self._moments:
            moments = rank_moments(self.schedule, self.loads, rank)
            pairs = zip(moments.stages, moments.loads, strict=True)
            fits = [StageFit.of([load], [self.speeds[stage]], [np.inf], self.updates) for stage, load in pairs]
            self._moments[rank] = moments, fits
        return self._moments[rank]

    def _part(self, rank: int, place: int, interval: Interval, *, keeping: bool) -> _Ways:
        """Return the ways of one stage of a rank, bytes that are always there included."""
        moments, fits = self._rank(rank)
        key = moments.stages[place], *interval, keeping
        if key not in self._parts:
            frontiers = self._keeping if keeping else self.frontiers
            busy, host, held = frontiers.ways(*interval, fits[place], moments.computes[place])
            held = held + self._static[moments.stages[place]][interval]
            ways = _Ways(busy, host, held, np.arange(len(busy))[None, :], frontiers.interval(*interval).alike)
            self._parts[key] = ways.thin(held.max(axis=0))
        return self._parts[key]

    @cached_property
    def _static(self) -> list[Array]:
        return [self.chain.static_bytes(load) for load in self.loads]

    def _combine(self, rank: int, intervals: tuple[Interval, ...], limit: float, *, keeping: bool) -> _Ways | None:
        """Return combinations of ways of all stages of a rank that fit; None where none do."""
        parts = [self._part(rank, place, interval, keeping=keeping) for place, interval in enumerate(intervals)]
        floors = [part.held.min(axis=1) for part in parts]
        ways = parts[0]
        for place, part in enumerate(parts):
            ways = part if place == 0 else _product(ways, part)
            # At every moment the stages that follow hold at least so much.
            peaks = (ways.held + sum(floors[place + 1 :], np.zeros(1))[:, None]).max(axis=0)
            columns = np.flatnonzero(peaks <= limit)
            if not len(columns):
                return None
            ways = ways.select(columns)
            if place < len(parts) - 1:
                ways = ways.thin(peaks[columns])
        return ways

    def _best(self, intervals: tuple[Interval, ...], ways: _Ways, first: Array, *, keeping: bool) -> RankWay:
        """Return the way with the least of `first`; of equal ones the fastest, then the one with the least bytes."""
        frontiers = self._keeping if keeping else self.frontiers
        longest = np.maximum(ways.busy, ways.host)
        peaks = ways.held.max(axis=0)
        column = int(np.lexsort((peaks, ways.busy, longest, first))[0])
        rows = ways.rows[:, column]
        link = max(float(self.chain.transfer_ms[interval]) for interval in intervals)
        policies = (frontiers.policies_of(*interval, int(row)) for interval, row in zip(intervals, rows, strict=True))
        return RankWay(max(float(longest[column]), link), float(peaks[column]), tuple(policies))


def _product(ways: _Ways, part: _Ways) -> _Ways:
    """Combine every way with every way of one more stage."""
    count = len(part.busy)
    return _Ways(
        busy=(ways.busy[:, None] + part.busy).ravel(),
        host=(ways.host[:, None] + part.host).ravel(),
        held=(ways.held[:, :, None] + part.held[:, None, :]).reshape(len(part.held), -1),
        rows=np.concatenate([np.repeat(ways.rows, count, axis=1), np.tile(part.rows, len(ways.busy))]),
        alike=np.where((ways.alike >= 0) & (part.alike >= 0), ways.alike * count + part.alike, -1),
    )
