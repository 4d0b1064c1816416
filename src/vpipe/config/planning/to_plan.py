"""The plan that a run's YAML says, and the YAML that a plan means."""

from __future__ import annotations

from typing import Any

from vpipe.config.run import RunConfig
from vpipe.config.sections import PipelineConfig
from vpipe.plan.plan import Plan, RecomputeMode
from vpipe.plan.recipe import BESIDES, OPTIONS, Option, RankTimes, Recipe

__all__ = ["to_plan", "to_recipe", "with_plan"]


def to_recipe(run: RunConfig) -> Recipe:
    """Return what a run says of the order of its actions; what it leaves to the planner is open."""
    pipeline, count = run.pipeline, run.pipeline.num_microbatches
    said: dict[str, Any] = {option.name: getattr(pipeline, option.key) or option.default for option in OPTIONS}
    said |= {name: getattr(run.plan, name) or () for name in BESIDES}
    return Recipe(
        pipeline.schedule, None if count == "auto" else count, run.num_ranks, pipeline.stages_per_rank, **said
    )


def to_plan(run: RunConfig) -> Plan:
    """Return what a run says of its plan; what it leaves to the planner is open.

    Raises:
        PlanError: it contradicts itself.
    """
    mode: RecomputeMode = "except_last" if run.pipeline.recompute == "except_last" else "always"
    return Plan.of(
        to_recipe(run),
        partition=run.plan.partition,
        policies=run.plan.policies,
        recompute_ratio=run.recompute_ratios,
        recompute=mode,
    )


def with_plan(run: RunConfig, plan: Plan) -> RunConfig:
    """Return the run with nothing left open: as the plan has it."""
    num_ranks, num_microbatches = plan.sizes
    given = any(run.recompute_ratios)
    pipeline: dict[str, object] = {
        "schedule": plan.schedule,
        "num_microbatches": num_microbatches,
        "stages_per_rank": plan.cut.num_stages // num_ranks,
        "recompute": run.pipeline.recompute if given else None,
        **{option.key: _as_key(option, plan) for option in OPTIONS},
    }
    planned: dict[str, object] = {
        "partition": list(plan.cut),
        "policies": None if given else [policy.value for policy in plan.block_policies],
        **{name: _plain(getattr(plan, name)) for name in BESIDES},
    }
    sections = {
        "pipeline": run.pipeline.model_copy(update=pipeline),
        "plan": run.plan.model_copy(update=planned),
    }
    return run.model_copy(update=sections)


def _as_key(option: Option, plan: Plan) -> object:
    """Return an option as the section holds it."""
    value = getattr(plan, option.name)
    return PipelineConfig.model_fields[option.key].default if value == option.default else _plain(value)


def _plain(value: object) -> object:
    """Return a value as a section holds it."""
    if isinstance(value, RankTimes):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value
