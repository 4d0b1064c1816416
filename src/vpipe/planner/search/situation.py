"""One setting on one profile, under limits: judges any plan for it, by the simulator and by its bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property

from vpipe.plan.partition import Partition
from vpipe.plan.policy import Policy
from vpipe.planner.cost.costs import ChainCosts, simulator_costs, speeds_of
from vpipe.planner.cost.loads import StageLoad, stage_loads
from vpipe.planner.cost.memory import rank_memory, stage_bytes
from vpipe.planner.cost.policies import Frontiers
from vpipe.planner.cost.shared_ranks import SharedRanks
from vpipe.planner.cut.stage_times import StageTimes
from vpipe.planner.profile.profile import Profile
from vpipe.planner.search.candidate import Candidate, arrange
from vpipe.planner.search.setting import Setting
from vpipe.schedule.action import Kind
from vpipe.schedule.passes.recompute_ahead import recompute_ahead
from vpipe.schedule.schedule import Schedule, uses_split_backward
from vpipe.schedule.simulate.simulate import simulate

__all__ = ["Situation"]


class Situation:
    """A setting, what its microbatches cost, and bytes per rank that must not be exceeded."""

    def __init__(
        self,
        profile: Profile,
        setting: Setting,
        limits: Sequence[float],
        frontiers: Frontiers,
        schedule: Schedule,
        *,
        sockets: bool = False,
    ) -> None:
        """Use `schedule`, which shows the setting's steady state, and `frontiers` of its microbatch size."""
        self.sockets = sockets
        self.profile = profile
        self.setting = setting
        self.limits = tuple(limits)
        self.schedule = schedule
        self.chain = frontiers.chain
        self._frontiers = frontiers

    @classmethod
    def of(
        cls,
        profile: Profile,
        setting: Setting,
        limits: Sequence[float],
        policies: Sequence[Policy],
        cache: dict[tuple[int, bool], Frontiers],
        *,
        sockets: bool = False,
    ) -> Situation:
        """Make a situation; those with the same microbatches share what `cache` holds.

        `sockets` says how messages travel, which decides how many of them are in memory.
        """
        schedule = setting.build() if setting.synchronous else setting.build(setting.num_batches_until_steady)
        key = (setting.microbatch_size, uses_split_backward(schedule))
        if key not in cache:
            blocks = profile.at(setting.microbatch_size).blocks
            cache[key] = Frontiers(ChainCosts(profile, blocks, split_backward=key[1]), policies)
        return cls(profile, setting, limits, cache[key], schedule, sockets=sockets)

    def under(self, limits: Sequence[float]) -> Situation:
        """Return the same with other limits."""
        other = Situation(self.profile, self.setting, limits, self._frontiers, self.schedule, sockets=self.sockets)
        other.shared = self.shared  # what it has found out holds for any limits
        return other

    @cached_property
    def num_actions(self) -> int:
        """Computations of the schedule: what simulating it once takes."""
        return sum(map(len, self.schedule.orders))

    @cached_property
    def loads(self) -> tuple[StageLoad, ...]:
        """What the schedule makes every stage hold."""
        return stage_loads(self.schedule, sockets=self.sockets)

    @cached_property
    def speeds(self) -> tuple[float, ...]:
        """Speed of every stage's rank."""
        speeds = speeds_of(self.profile, self.setting.num_ranks)
        return tuple(speeds[self.schedule.position_of(stage)] for stage in range(self.schedule.num_stages))

    @cached_property
    def times(self) -> StageTimes:
        """How fast every stage can run every interval: within its rank's limit, where it has the rank to itself."""
        limits = [self.limits[self.schedule.position_of(stage)] for stage in range(self.schedule.num_stages)]
        if self.shares_ranks:
            limits = [math.inf] * len(limits)
        return StageTimes(self.chain, self._frontiers, self.loads, self.speeds, tuple(limits), self.updates)

    @property
    def shares_ranks(self) -> bool:
        """Tell whether ranks have several stages, which share memory and time of the rank."""
        return self.schedule.placement.stages_per_rank > 1

    @cached_property
    def shared(self) -> SharedRanks:
        """What cuts make of ranks with several stages."""
        return SharedRanks(self._frontiers, self.schedule, self.loads, self.speeds, self.updates)

    @cached_property
    def updates(self) -> float:
        """Updates for each microbatch that delay it: none in a synchronous schedule, where the pipeline has drained."""
        if self.setting.synchronous:
            return 0.0
        kinds = Counter(action.kind for action in self.schedule.stage_order(0))
        return kinds[Kind.STEP] / kinds[Kind.F]

    def draft(self, partition: Sequence[int], policies: Sequence[Policy], ahead: Collection[int] = ()) -> Candidate:
        """Return the plan without its time; stages of `ahead` recompute before the gradient arrives."""
        blocks, placement = self.chain.blocks, self.schedule.placement
        cut = Partition(partition)
        stages = [
            stage_bytes(blocks, start, stop, policies, is_split=self.chain.is_split, is_ahead=stage in ahead)
            for stage, (start, stop) in enumerate(cut.ranges)
        ]
        memory = rank_memory(self.schedule, self.loads, stages)
        versions = [load.num_versions for load in self.loads]
        moves = [any(moment.copies < moment.full for moment in load.moments) for load in self.loads]
        costs = simulator_costs(self.profile, blocks, cut, policies, placement, versions, moves)
        return Candidate(self.setting, cut, tuple(policies), memory, costs, math.nan, tuple(ahead), self.updates)

    def judge(self, draft: Candidate) -> Candidate:
        """Return the plan with its time, by the simulator: of a batch, or of one in an asynchronous steady state."""
        end = simulate(arrange(self.schedule, draft), draft.costs).makespan
        if not self.setting.synchronous:
            longer, more = self._longer
            end = (simulate(arrange(longer, draft), draft.costs).makespan - end) / more
            # Until a rank far behind has held up all others, batches may seem to take less than it needs for one.
            end = max(end, self.setting.num_microbatches * self._busiest(draft, with_moves=False))
        return replace(draft, step_ms=end)

    def recompute_earlier(self, plan: Candidate) -> Candidate:
        """Let stages recompute before the gradient arrives, where that saves time and there is the memory for it."""
        able = [
            stage
            for stage, time in enumerate(plan.costs.recompute)
            if time and self.draft(plan.partition, plan.policies, [stage]).fits(self.limits)
        ]
        _, stages = recompute_ahead(self.schedule, plan.costs, able)
        draft = self.draft(plan.partition, plan.policies, stages)
        if not stages or not draft.fits(self.limits):
            return plan
        judged = self.judge(draft)
        return judged if judged.step_ms < plan.step_ms else plan

    @cached_property
    def _longer(self) -> tuple[Schedule, int]:
        more = max(1, -(-2 * self.setting.num_ranks // self.setting.num_microbatches))
        return self.setting.build(self.setting.num_batches_until_steady + more), more

    def estimate(self, draft: Candidate) -> float:
        """Estimate the time of a batch without simulating: once through all stages, and the busiest rank's rest."""
        link = max(draft.costs.message_bytes[:-1], default=0.0) / draft.costs.bandwidth
        busiest, count = max(self._busiest(draft), link), self.setting.num_microbatches
        if not self.setting.synchronous:
            return busiest * count
        once = sum(draft.busy_ms) + len(draft.busy_ms) * self.chain.dispatch_ms
        return once / self.schedule.placement.stages_per_rank + (count - 1) * busiest

    def _busiest(self, draft: Candidate, *, with_moves: bool = True) -> float:
        """Return what a microbatch takes of the busiest rank; a rank may also move memory while it waits."""
        dispatch = self.chain.dispatch_ms + self.updates * self.chain.dispatch_each_ms
        ranks = [0.0] * self.schedule.num_ranks
        for stage, (busy, lost) in enumerate(zip(draft.busy_ms, draft.lost_ms, strict=True)):
            ranks[self.schedule.position_of(stage)] += busy + dispatch - (0.0 if with_moves else lost)
        return max(ranks)
