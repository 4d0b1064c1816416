"""A run and its plan: what the run asks the planner, what is decided, and the run that follows from that."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

from vpipe.config.planning.profiled import check_profile_fits
from vpipe.config.planning.to_plan import to_recipe
from vpipe.config.run import RunConfig
from vpipe.config.sections import LaunchConfig
from vpipe.errors import PlanError
from vpipe.plan.plan import Plan
from vpipe.plan.policy import Policy, trailing_policies
from vpipe.plan.prediction import Prediction
from vpipe.planner.profile.profile import Profile
from vpipe.planner.search.by_hand import Given
from vpipe.planner.search.candidate import Candidate
from vpipe.planner.search.search import Outcome, Request, find_plan, judge_partition, plan_partition
from vpipe.planner.search.setting import sizes_to_profile
from vpipe.schedule.registry import SCHEDULES, find_entry

__all__ = [
    "Decision",
    "build_request",
    "decide",
    "given_policies",
    "judge_by_hand",
    "name_schedules",
    "own_counts",
    "sizes_needed",
]

_NOT_CHOSEN = ("naive", "searched")


@dataclass(frozen=True)
class Decision:
    """What was decided of a run, and the request that it answers."""

    request: Request
    chosen: Candidate
    found: Outcome | None = None
    """All that the planner found, where it was free to cut."""

    @property
    def plan(self) -> Plan:
        """What the run does."""
        return self.chosen.plan

    @property
    def prediction(self) -> Prediction:
        """What it is expected to take."""
        return self.chosen.predict(self.request.profile) if self.found is None else self.found.prediction


def own_counts(run: RunConfig) -> list[int] | None:
    """Return the number of microbatches that the run gives; None where it leaves it to the planner."""
    return None if run.pipeline.num_microbatches == "auto" else [run.num_microbatches]


def sizes_needed(run: RunConfig, counts: Sequence[int] | None) -> tuple[int, ...]:
    """Return the microbatch sizes that a profile must tell about to choose from `counts`; None: from any numbers.

    Raises:
        PlanError: a number does not divide the batch.
    """
    batch = run.train.batch_size
    if counts is None:
        return sizes_to_profile(run.num_ranks, batch)
    for count in counts:
        if batch % count:
            raise PlanError(
                f"train.batch_size = {batch} cannot be cut into {count} equal microbatches, and the planner counts "
                "with one size; use a divisor"
            )
    return tuple(sorted({batch // count for count in counts}))


def name_schedules(name: str) -> tuple[str, ...]:
    """Return the schedules that a name stands for: `auto` is every closed form with the answer of one process.

    Raises:
        ScheduleError: there is no such schedule.
    """
    if name == "auto":
        return tuple(key for key, entry in SCHEDULES.items() if entry.synchronous and key not in _NOT_CHOSEN)
    find_entry(name)
    return (name,)


def build_request(run: RunConfig, profile: Profile) -> Request:
    """Return what a run asks the planner.

    Raises:
        ScheduleError: there is no such schedule.
    """
    pipeline, limit = run.pipeline, run.plan.memory_limit
    is_own = pipeline.schedule == "auto" and pipeline.stages_per_rank == 1
    never = pipeline.recompute == "never"
    return Request(
        profile,
        run.num_ranks,
        run.train.batch_size,
        name_schedules(pipeline.schedule),
        own_counts(run),
        [limit] if isinstance(limit, int) else limit,
        None if is_own else pipeline.stages_per_rank,
        to_recipe(run),
        _may_move_versions(run, profile),
        policies=[policy for policy in Policy if not (never and policy is Policy.RECOMPUTE)],
        sockets=_uses_sockets(run.launch, profile),
    )


def _uses_sockets(launch: LaunchConfig, profile: Profile) -> bool:
    """Tell whether some messages may go through sockets, or lie in a GPU's memory, which holds more of them."""
    hosts = {machine.partition(":")[0] for machine in launch.machines}
    on_gpu = launch.distributed_backend == "nccl" or profile.machine.get("device", "cpu") != "cpu"
    return not launch.shared_memory or len(hosts) > 1 or on_gpu


def _may_move_versions(run: RunConfig, profile: Profile) -> bool:
    """Tell whether weight versions that move are for the planner to choose: only for a limit, where nobody says."""
    is_open = run.plan.memory_limit is not None and profile.host is not None
    return is_open and run.plan.swap_versions is None


def decide(run: RunConfig, profile: Profile) -> Decision:
    """Plan a run: choose what it leaves open, keep what it gives.

    Raises:
        PlanError: nothing fits within its memory limit (the text names the smallest that something fits in), or the
            profile is not of this run.
        ScheduleError: no schedule can be built for it.
    """
    check_profile_fits(run, profile, "the profile")
    request = build_request(run, profile)
    if run.plan.partition == "auto":
        found = find_plan(request)
        return Decision(request, found.best, found)
    return Decision(request, plan_partition(*_by_hand(run, request, run.plan.partition, is_planned=run.needs_plan)))


def judge_by_hand(run: RunConfig, request: Request, partition: Sequence[int] | str, *, is_planned: bool) -> Candidate:
    """Judge a partition as a run with it would run; one that is not planned does nothing that it does not say itself.

    Raises:
        PlanError: it does not cut the model into the stages.
    """
    return judge_partition(*_by_hand(run, request, partition, is_planned=is_planned))


def _by_hand(
    run: RunConfig, request: Request, partition: Sequence[int] | str, *, is_planned: bool
) -> tuple[Request, Sequence[int] | str, Given, Collection[int] | None]:
    """Return what judges a given partition: what is given by hand is not changed beyond what was left open."""
    ahead = run.plan.recompute_ahead
    chosen = None if is_planned and not ahead else ahead
    return replace(request, is_eager=False), partition, partial(given_policies, run), chosen


def given_policies(run: RunConfig, cut: Sequence[int]) -> Sequence[Policy] | None:
    """Return what the run itself says about activations; None leaves them to the planner.

    Raises:
        PlanError: it lists ratios for another number of stages, or recomputes in a way that is not predicted.
    """
    if run.plan.policies is not None:
        return [Policy(name) for name in run.plan.policies]
    if run.pipeline.recompute == "except_last":
        raise PlanError(
            "pipeline.recompute = 'except_last' keeps a batch's last microbatch whole, which is not predicted: give "
            "'always', or recompute_ratio, or plan.policies"
        )
    ratios = run.recompute_ratios
    if len(set(ratios)) == 1:
        ratios = ratios[:1] * len(cut)
    if len(ratios) != len(cut):
        raise PlanError(f"pipeline.recompute_ratio has {len(ratios)} entries for {len(cut)} stages; give one per stage")
    return trailing_policies(cut, ratios) if any(ratios) else None
