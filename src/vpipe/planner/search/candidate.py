"""A plan under judgement, with what it is predicted to cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from vpipe.plan.partition import Partition
from vpipe.plan.plan import Plan
from vpipe.plan.policy import Policy, stages_with
from vpipe.plan.prediction import Prediction
from vpipe.plan.recipe import insert_passes
from vpipe.planner.cost.memory import RankMemory
from vpipe.planner.profile.profile import Profile
from vpipe.planner.search.setting import Setting
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.simulate.costs import Costs

__all__ = ["Candidate", "arrange"]


@dataclass(frozen=True)
class Candidate:
    """A plan under judgement: what is cut where, what every block does, and what that is predicted to cost."""

    setting: Setting
    partition: Partition
    policies: tuple[Policy, ...]
    """Of every block."""
    memory: tuple[RankMemory, ...]
    """Of every rank."""
    costs: Costs
    """What the prediction is made of: ms and bytes per stage."""
    step_ms: float
    """One batch."""
    ahead: tuple[int, ...] = ()
    """The stages that recompute before the gradient arrives."""
    updates: float = 0.0
    """Updates of the weights that come between the computations, for each microbatch."""

    @property
    def sample_ms(self) -> float:
        """Time per sample."""
        return self.step_ms / self.setting.batch_size

    @property
    def stage_ms(self) -> tuple[float, ...]:
        """Time that each stage computes for one microbatch, what it loses by moves included."""
        costs = self.costs
        times = zip(costs.forward, costs.input_grad, costs.weight_grad, costs.recompute, self.lost_ms, strict=True)
        return tuple(map(sum, times))

    @property
    def busy_ms(self) -> tuple[float, ...]:
        """Time that each stage takes of its rank for one microbatch: that, and its share of an update."""
        return tuple(time + self.updates * step for time, step in zip(self.stage_ms, self.costs.step, strict=True))

    @property
    def lost_ms(self) -> tuple[float, ...]:
        """Time that each stage loses for one microbatch because it moves memory to the host and back."""
        costs, moving = self.costs, set(self.setting.moving)
        pairs = enumerate(zip(costs.move, costs.move_versions, strict=True))
        return tuple(2 * costs.move_share * (own + weights * (stage in moving)) for stage, (own, weights) in pairs)

    @property
    def plan(self) -> Plan:
        """What would run."""
        per_rank = self.partition.num_stages // self.setting.num_ranks
        recipe = replace(self.setting.recipe.with_ahead(self.ahead), stages_per_rank=per_rank)
        return Plan.of(recipe, partition=self.partition, policies=self.policies)

    def predict(self, profile: Profile, lower_bound_ms: float | None = None) -> Prediction:
        """Return what the plan is expected to take, by a profile."""
        return Prediction(
            self.step_ms,
            self.sample_ms,
            tuple({**asdict(memory), "total": memory.total} for memory in self.memory),
            lower_bound_ms,
            profile.fingerprint,
            dict(profile.made_of),
        )

    def fits(self, limits: Sequence[float]) -> bool:
        """Tell whether every rank stays within its limit."""
        return all(memory.most <= limit for memory, limit in zip(self.memory, limits, strict=True))


def arrange(schedule: Schedule, candidate: Candidate) -> Schedule:
    """Return a schedule of the candidate's setting with what its policies need besides."""
    swapping = stages_with(Policy.SWAP, candidate.partition, candidate.policies)
    return insert_passes(schedule, ahead=candidate.ahead, swapping=swapping)
