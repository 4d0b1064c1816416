"""How fast every stage can run every interval under its byte limit: the costs that the cut is made by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vpipe.plan.policy import Policy
from vpipe.planner.cost.costs import Array, ChainCosts
from vpipe.planner.cost.loads import StageLoad
from vpipe.planner.cost.memory import held_bytes
from vpipe.planner.cost.policies import Frontiers, StageFit
from vpipe.planner.cut.exact import cut_minimax, useful_intervals

__all__ = ["StageTimes"]

_MARGIN = 1.15
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class StageTimes:
    """Stages in order, each with what it holds at once, the speed of its rank and its bytes."""

    chain: ChainCosts
    frontiers: Frontiers
    loads: tuple[StageLoad, ...]
    speeds: tuple[float, ...]
    limits: tuple[float, ...]
    updates: float = 0.0
    """Updates that come between the computations, for each microbatch."""

    @cached_property
    def fit(self) -> StageFit:
        """The same as arrays."""
        return StageFit.of(self.loads, self.speeds, self.limits, self.updates)

    @cached_property
    def kept(self) -> list[Array]:
        """Times with all activations kept, infinite where they do not fit.

        Stages that take equally long and have no limit share one matrix.
        """
        return [
            free if limit == np.inf else np.where(self.chain.kept_bytes(load) <= limit, free, np.inf)
            for load, free, limit in zip(self.loads, self._unlimited, self.limits, strict=True)
        ]

    @cached_property
    def _unlimited(self) -> list[Array]:
        kinds = [(speed, load.keeps_versions) for load, speed in zip(self.loads, self.speeds, strict=True)]
        times = {kind: self.chain.kept_ms(kind[0], self.updates, keeps_versions=kind[1]) for kind in set(kinds)}
        return [times[kind] for kind in kinds]

    @cached_property
    def optimistic(self) -> list[Array]:
        """Times that no policies can beat: nothing added, infinite only where nothing can fit."""
        if not self.has_policies:
            return self.kept
        return [
            np.where(self._least_bytes(load) <= limit, free, np.inf)
            for load, free, limit in zip(self.loads, self._unlimited, self.limits, strict=True)
        ]

    @property
    def has_policies(self) -> bool:
        """Tell whether blocks may do anything else than keep, and any limit could make them."""
        return len(self.frontiers.policies) > 1 and any(np.isfinite(self.limits))

    @property
    def is_exact(self) -> bool:
        """Tell whether `best` is the best there is, not only among the ways that were looked at."""
        return not self.has_policies or self.frontiers.is_exact

    @cached_property
    def best(self) -> tuple[float, list[int], list[Array]]:
        """The smallest time of the busiest stage, blocks per stage, and the times of the intervals near it.

        Intervals that cannot be part of a cut with a busiest stage up to about 15 % slower are left infinite.
        """
        if not self.has_policies:
            return (*cut_minimax(self.kept), self.kept)
        bound, _ = cut_minimax(self.optimistic)
        ceiling = max((float(times[np.isfinite(times)].max(initial=0.0)) for times in self.optimistic), default=0.0)
        while np.isfinite(bound):
            cap = bound * _MARGIN
            times = self._times_up_to(cap)
            value, partition = cut_minimax(times)
            if value <= cap:
                return value, partition, times
            if cap > ceiling and not np.isfinite(value):
                break
            bound = cap
        return np.inf, [], self.kept

    def policies(self, partition: Sequence[int]) -> tuple[Policy, ...] | None:
        """Return the policy of every block under a given partition; None where it cannot fit."""
        chosen: list[Policy] = []
        start = 0
        for stage, size in enumerate(partition):
            found = self._policies(stage, start, start + size)
            if found is None:
                return None
            chosen += found
            start += size
        return tuple(chosen)

    @cached_property
    def _found(self) -> dict[tuple[int, int, int], tuple[Policy, ...] | None]:
        return {}

    def _policies(self, stage: int, start: int, stop: int) -> tuple[Policy, ...] | None:
        if np.isfinite(self.kept[stage][start, stop]):
            return (Policy.KEEP,) * (stop - start)
        if not self.has_policies:
            return None
        key = (stage, start, stop)
        if key not in self._found:
            static = float(self._static[stage, start, stop])
            self._found[key] = self.frontiers.best(start, stop, self.fit.select(np.array([stage])), static)
        return self._found[key]

    def _times_up_to(self, cap: float) -> list[Array]:
        """Return the exact times of the intervals that a cut with no stage above `cap` may use."""
        allowed = useful_intervals([times <= cap for times in self.optimistic])
        times = [np.where(matrix, kept, np.inf) for matrix, kept in zip(allowed, self.kept, strict=True)]
        open_ = np.array([matrix & ~np.isfinite(kept) for matrix, kept in zip(allowed, self.kept, strict=True)])
        for start, stop in np.argwhere(open_.any(axis=0)):
            stages = np.flatnonzero(open_[:, start, stop])
            static = self._static[stages, start, stop]
            found = self.frontiers.times(int(start), int(stop), self.fit.select(stages), static)
            for stage, value in zip(stages, found, strict=True):
                times[stage][start, stop] = value
        return times

    @cached_property
    def _static(self) -> Array:
        return np.array([self.chain.static_bytes(load) for load in self.loads])

    def _least_bytes(self, load: StageLoad) -> Array:
        """Return bytes that a stage cannot go below: each block at its cheapest, at each peak by itself."""
        chain, policies = self.chain, self.frontiers.policies
        peaks = []
        for moment in load.moments:
            least = [min(held_bytes(block, policy, moment) for policy in policies) for block in chain.blocks]
            sums = np.concatenate([[0.0], np.cumsum(least)])
            peaks.append(chain.moment_bytes(moment) + (sums[None, :] - sums[:, None]) + chain.transient.at(moment))
        return np.asarray(chain.static_bytes(load) + np.maximum.reduce(peaks) - _TOLERANCE)
