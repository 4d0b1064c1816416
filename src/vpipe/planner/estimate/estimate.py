"""The planner and the simulator on paper: what a model would reach on machines that one does not have, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from vpipe.plan.policy import Policy
from vpipe.plan.recipe import Recipe
from vpipe.planner.estimate.analytic import BlockWork, Machine, ModelWork, analytic_profile, operation_ms
from vpipe.planner.estimate.screen import Screened, find_promising_plan
from vpipe.planner.search.candidate import Candidate, arrange
from vpipe.planner.search.search import Outcome, Request, find_plan
from vpipe.schedule.action import Kind
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.simulate.idle import CAUSES, idle_times
from vpipe.schedule.simulate.simulate import simulate

__all__ = ["SHARES", "Estimate", "estimate", "step_shares"]

SHARES: dict[str, str] = {
    "products": "matrix products",
    "memory": "operations bound by the device's memory",
    "exchange": "exchanges among the devices of a rank",
    "recompute": "recomputation",
    "swap": "moves to the host's memory and back",
    "step": "updates of the weights",
    "warmup": "waiting while the pipeline fills",
    "cooldown": "waiting while it drains",
    "imbalance": "waiting for stages that take longer",
    "communication": "waiting for messages",
    "waiting": "waiting, in a schedule too long to say for what",
}
"""What the ranks' time goes into, and how it is called."""

_MAX_EXPLAINED = 500_000
"""Actions of which the idle times are put down to causes."""


@dataclass(frozen=True)
class Estimate:
    """What was found for a model on a machine."""

    model: ModelWork
    machine: Machine
    outcome: Outcome
    unlimited_ms: float | None
    """Time of a step with the same microbatches if memory were no limit; None where all activations are kept anyway."""
    screened: Screened | None = None
    """Which settings were planned, where not all were."""

    @property
    def plan(self) -> Candidate:
        """The plan with the least time."""
        return self.outcome.best

    @property
    def num_devices(self) -> int:
        """Count all devices."""
        return self.plan.setting.num_ranks * self.machine.devices_per_rank

    @property
    def samples_per_s(self) -> float:
        """Samples in a second."""
        return 1000 / self.plan.sample_ms

    @property
    def tokens_per_s(self) -> float:
        """Tokens in a second; 0 for models without tokens."""
        return self.samples_per_s * self.model.tokens_per_sample

    @cached_property
    def model_flops_per_sample(self) -> float:
        """Matrix products that a sample needs: three times its forward's, whatever is recomputed."""
        return 3 * sum(work.forward_flops for work in self._works) / self.plan.setting.microbatch_size

    @property
    def model_tflops_per_device(self) -> float:
        """Matrix products per second and device that the model needs."""
        return self.model_flops_per_sample * self.samples_per_s / self.num_devices / 1e12

    @property
    def utilisation(self) -> float:
        """Those as a share of the devices' peak ("MFU")."""
        return self.model_tflops_per_device / self.machine.device.peak_tflops[self.machine.precision.compute]

    @cached_property
    def shares(self) -> dict[str, float]:
        """Share of all ranks' time that goes into each of `SHARES`."""
        return step_shares(self.plan, self._works, self.machine)

    @property
    def _works(self) -> tuple[BlockWork, ...]:
        return self.model.sizes[self.plan.setting.microbatch_size]


def estimate(
    model: ModelWork,
    machine: Machine,
    num_ranks: int,
    batch_size: int,
    *,
    schedules: Sequence[str] = ("1f1b",),
    memory_limit: int | Sequence[int],
    policies: Sequence[Policy] = tuple(Policy),
    stages_per_rank: int | None = None,
    options: Recipe | None = None,
) -> Estimate:
    """Find the plan with the least time per sample on a machine.

    Args:
        model: counted for microbatch sizes that divide the batch; all of them are tried.
        machine: what each rank is, and what connects them.
        num_ranks: stages' owners in the pipeline.
        batch_size: samples per update.
        schedules: names to choose from.
        memory_limit: bytes that each device may hold, or those of each rank.
        policies: what blocks may do with their activations.
        stages_per_rank: None: as the schedule has it.
        options: of the schedules, as `Request` has them.

    Raises:
        PlanError: more stages than blocks, or nothing fits: the text has the smallest limit that something fits in.
        ScheduleError: no schedule can be built.
    """
    request = Request(
        profile=analytic_profile(model, machine),
        num_ranks=num_ranks,
        batch_size=batch_size,
        schedules=schedules,
        num_microbatches=[batch_size // size for size in model.sizes],
        limits=[memory_limit] if isinstance(memory_limit, int) else memory_limit,
        stages_per_rank=stages_per_rank,
        options=options or Recipe(),
        is_eager=False,
        policies=policies,
    )
    outcome, screened = find_promising_plan(request)
    unlimited = None
    if set(outcome.best.policies) != {Policy.KEEP}:
        best = outcome.best.setting
        free = find_plan(
            replace(request, limits=None, schedules=[best.schedule], num_microbatches=[best.num_microbatches])
        )
        unlimited = free.best.sample_ms * batch_size
    return Estimate(model, machine, outcome, unlimited, screened)


def step_shares(plan: Candidate, works: Sequence[BlockWork], machine: Machine) -> dict[str, float]:
    """Return the shares of all ranks' time that go into each of `SHARES`; together they are 1."""
    setting, costs = plan.setting, plan.costs
    count, num_ranks = setting.num_microbatches, setting.num_ranks
    spent = dict.fromkeys(SHARES, 0.0)
    for work in works:
        for kind, time in _kinds_ms(work, machine).items():
            spent[kind] += count * time
    computed = math.fsum(spent.values())
    spent["recompute"] = count * math.fsum(costs.recompute)
    spent["swap"] = max(0.0, count * math.fsum(plan.stage_ms) - spent["recompute"] - computed)
    schedule, later = _batches(plan)
    spent["step"] = _num_updates(schedule, count) * math.fsum(_per_stage(costs.step, len(plan.partition)))
    total = num_ranks * plan.step_ms
    idle = total - math.fsum(spent.values())
    for cause, share in _idle_causes(plan, schedule, later).items():
        spent["swap" if cause == "host" else cause] += share * idle
    return {kind: time / total for kind, time in spent.items()}


def _batches(plan: Candidate) -> tuple[Schedule, Schedule | None]:
    """Return the schedule of a batch; of an asynchronous plan, one until it is steady, and one of a batch more."""
    setting = plan.setting
    if setting.synchronous:
        return arrange(setting.build(), plan), None
    steady = setting.num_batches_until_steady
    return arrange(setting.build(steady), plan), arrange(setting.build(steady + 1), plan)


def _num_updates(schedule: Schedule, num_microbatches: int) -> float:
    """Count the updates of a batch."""
    kinds = Counter(action.kind for action in schedule.stage_order(0))
    return num_microbatches * kinds[Kind.STEP] / kinds[Kind.F]


def _kinds_ms(work: BlockWork, machine: Machine) -> dict[str, float]:
    """Return the time of one microbatch, forward and backward, by what bounds it."""
    times = {"products": 0.0, "memory": 0.0}
    for operation in (*work.forward, *work.input_grad, *work.weight_grad):
        time = operation_ms(operation, machine)
        is_product = operation.flops * operation.count / machine.flops_per_ms >= time * (1 - 1e-9)
        times["products" if is_product else "memory"] += time
    exchanged = machine.exchange_ms(work.output_bytes) + machine.exchange_ms(work.input_bytes)
    return times | {"exchange": exchanged}


def _idle_causes(plan: Candidate, schedule: Schedule, later: Schedule | None) -> Mapping[str, float]:
    """Return how the idle time divides: of an asynchronous plan, what a batch more adds to it."""
    if sum(map(len, (later or schedule).orders)) > _MAX_EXPLAINED:
        return {"waiting": 1.0}
    times = _idle_ms(plan, schedule)
    if later is not None:
        more = _idle_ms(plan, later)
        times = {cause: max(0.0, more[cause] - times[cause]) for cause in CAUSES}
    whole = math.fsum(times.values())
    return {cause: time / whole for cause, time in times.items()} if whole else {"imbalance": 1.0}


def _idle_ms(plan: Candidate, schedule: Schedule) -> dict[str, float]:
    ranks = idle_times(simulate(schedule, plan.costs))
    return {cause: math.fsum(rank[cause] for rank in ranks) for cause in CAUSES}


def _per_stage(times: float | Sequence[float], num_stages: int) -> Sequence[float]:
    return times if isinstance(times, Sequence) else [times] * num_stages
