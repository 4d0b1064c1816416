"""Whether what a run leaves to the planner, and what it says itself about plans, fits the rest of it."""

from __future__ import annotations

from collections.abc import Iterator

from vpipe.config.fields import show
from vpipe.config.problems import Problem
from vpipe.config.run import RunConfig
from vpipe.errors import PlanError
from vpipe.plan.prediction import Prediction
from vpipe.plan.recipe import BESIDES, OPTIONS
from vpipe.schedule.csv_file import is_csv_file
from vpipe.schedule.registry import find_entry

__all__ = ["check_planning"]

_OF_ONE_SCHEDULE = tuple(option.key for option in OPTIONS if option.builder not in find_entry("1f1b").options)


def check_planning(run: RunConfig) -> Iterator[Problem]:
    """Check the keys of `plan`, and what they need of others."""
    yield from _check_policies(run)
    for name in BESIDES:
        yield from _check_stages(run, name, getattr(run.plan, name))
    yield from _check_limit(run)
    yield from _check_schedule(run)
    yield from _check_predicted(run)


def _check_policies(run: RunConfig) -> Iterator[Problem]:
    plan, pipeline = run.plan, run.pipeline
    policies, partition = plan.policies, plan.partition
    chosen = pipeline.recompute is not None or any(run.recompute_ratios)
    keys = ("plan.policies", "plan.partition", "pipeline.recompute", "pipeline.recompute_ratio")
    if partition == "auto" and (fix := _fix_choice(run)):
        how = f"leave {fix[0]} out, or say --set {fix[1]}"
        yield Problem(keys, f"plan.partition = 'auto' lets the planner choose what recomputes; {how}")
        return
    if policies is None:
        return
    if chosen:
        text = "plan.policies and pipeline.recompute or recompute_ratio say the same thing twice; keep one"
        yield Problem(keys, text)
    num_blocks = sum(partition) if isinstance(partition, list) else run.num_blocks
    if num_blocks is not None and len(policies) != num_blocks:
        text = f"plan.policies has {len(policies)} entries for {num_blocks} blocks; give one per block"
        yield Problem((*keys, "model.num_layers"), text)


def _fix_choice(run: RunConfig) -> tuple[str, str] | None:
    """Return the key that says what recomputes, and how to say that it does not; None where nothing is said.

    `never` says what the planner may not do, which it keeps.
    """
    if run.plan.policies is not None:
        return "plan.policies", "plan.policies=null"
    if run.pipeline.recompute in ("always", "except_last"):
        return "pipeline.recompute", "pipeline.recompute=null"
    return ("pipeline.recompute_ratio", "pipeline.recompute_ratio=0") if any(run.recompute_ratios) else None


def _check_stages(run: RunConfig, key: str, stages: object) -> Iterator[Problem]:
    for stage in stages if isinstance(stages, list) else ():
        if stage >= run.num_stages:
            text = f"plan.{key} has stage {stage}; there are stages 0 to {run.num_stages - 1}"
            yield Problem((f"plan.{key}", "pipeline.num_ranks", "pipeline.stages_per_rank"), text)
            return


def _check_limit(run: RunConfig) -> Iterator[Problem]:
    limit = run.plan.memory_limit
    if run.needs_plan and run.pipeline.recompute == "except_last" and run.plan.partition != "auto":
        yield Problem(
            ("pipeline.recompute", "plan.memory_limit", "plan.partition", "pipeline.num_microbatches"),
            "pipeline.recompute = 'except_last' keeps a batch's last microbatch whole, which plan.memory_limit and "
            "what is left to the planner cannot count with; give 'always', recompute_ratio or plan.policies, or null",
        )
    if isinstance(limit, list) and len(limit) not in (1, run.num_ranks):
        text = (
            f"plan.memory_limit has {len(limit)} entries for {run.num_ranks} ranks; give one for all, or one per rank"
        )
        yield Problem(("plan.memory_limit", "pipeline.num_ranks", "launch.machines"), text)


def _check_schedule(run: RunConfig) -> Iterator[Problem]:
    pipeline = run.pipeline
    if run.needs_plan and (is_csv_file(pipeline.schedule) or pipeline.schedule == "searched"):
        yield Problem(
            ("pipeline.schedule", "plan.partition", "plan.memory_limit", "pipeline.num_microbatches"),
            f"pipeline.schedule = {show(pipeline.schedule)} is an order for given times, and plan.partition, "
            "plan.memory_limit or pipeline.num_microbatches leaves these to the planner; name another schedule, or "
            "give the partition and the microbatches, and no limit",
        )
    if pipeline.schedule != "auto":
        return
    for key in _OF_ONE_SCHEDULE:
        if getattr(pipeline, key):
            text = f"pipeline.{key} = {show(getattr(pipeline, key))} needs a schedule that has it, not 'auto'"
            yield Problem((f"pipeline.{key}", "pipeline.schedule"), text)


def _check_predicted(run: RunConfig) -> Iterator[Problem]:
    if run.plan.predicted is None:
        return
    keys = ("plan.predicted", "plan.partition", "pipeline.num_ranks")
    try:
        predicted = Prediction.from_dict(run.plan.predicted)
    except PlanError as error:
        yield Problem(keys, f"plan.{error}")
        return
    if (count := len(predicted.memory_bytes)) != run.num_ranks:
        yield Problem(
            keys, f"plan.predicted has memory_bytes of {count} ranks and there are {run.num_ranks}; plan again"
        )
