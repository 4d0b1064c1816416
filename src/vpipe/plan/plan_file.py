"""A plan as a file: the original's ``{"partition": ..., "recompute_ratio": ...}``, and all that it says besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vpipe.errors import PlanError
from vpipe.plan.plan import Plan
from vpipe.plan.prediction import Prediction
from vpipe.plan.recipe import BESIDES, OPTIONS, RankTimes

__all__ = ["DERIVED_KEYS", "PLAN_KEYS", "plan_from_dict", "plan_to_dict"]

_OPTION_KEYS = tuple(option.key for option in OPTIONS)
PLAN_KEYS = (
    *("schedule", "num_ranks", "num_microbatches", "microbatch_size", "stages_per_rank"),
    *_OPTION_KEYS,
    *("policies", "recompute"),
    *BESIDES,
    "predicted",
)
"""What a plan says beside the original's keys, all of which a run takes."""
DERIVED_KEYS = (
    *("synchronous", "depths", "stages", "cuts", "fingerprint", "profile"),
    *("bottleneck", "alternatives", "smallest_limits"),
)
"""What follows from the others, for people and tools."""


def plan_to_dict(
    plan: Plan,
    *,
    microbatch_size: int | None = None,
    prediction: Prediction | None = None,
    ratios: Sequence[float] | None = None,
    **beside: Any,
) -> dict[str, Any]:
    """Return a closed plan for JSON, with what it is expected to take and what else is known `beside` it.

    `policies` holds what a ratio cannot say: what every block does, in model order. `depths` are the warmup forwards of
    every stage, whether they were given or not. `ratios` that say all of it are written as they were given, without
    policies.
    """
    num_ranks, num_microbatches = plan.sizes
    return {
        "partition": list(plan.cut),
        "recompute_ratio": list(plan.ratios if ratios is None else ratios),
        **({} if ratios is not None else {"policies": [policy.value for policy in plan.block_policies]}),
        **({} if plan.recompute == "always" else {"recompute": plan.recompute}),
        "schedule": plan.schedule,
        "synchronous": plan.synchronous,
        "num_ranks": num_ranks,
        "num_microbatches": num_microbatches,
        **({} if microbatch_size is None else {"microbatch_size": microbatch_size}),
        "stages_per_rank": plan.cut.num_stages // num_ranks,
        **{option.key: _plain(plan.options[option.name]) for option in OPTIONS if option.name in plan.options},
        **{name: _plain(value) for name in BESIDES if (value := getattr(plan, name))},
        "depths": plan.warmups(),
        **beside,
        "fingerprint": plan.fingerprint(),
        **({} if prediction is None else {"predicted": prediction.to_dict()}),
        **({} if prediction is None or prediction.profile is None else {"profile": prediction.profile}),
    }


def plan_from_dict(content: Mapping[str, Any], base: Plan | None = None) -> Plan:
    """Read the plan in a file's content; what older files do not say is as in `base`.

    Raises:
        PlanError, ConfigError: a value is of another form than a plan has it.
    """
    said: dict[str, Any] = {}
    for name in ("schedule", "num_microbatches", "num_ranks", "stages_per_rank", "recompute", *BESIDES):
        if content.get(name) is not None:
            said[name] = content[name]
    said |= {option.name: content[option.key] for option in OPTIONS if content.get(option.key) is not None}
    if (policies := content.get("policies")) is not None:
        said |= {"policies": policies, "recompute_ratio": 0.0}
    elif (ratios := content.get("recompute_ratio")) is not None:
        said |= {"policies": None, "recompute_ratio": ratios}
    plan = replace(base or Plan(), **said)
    if (partition := content.get("partition")) is None:
        return plan
    plan = replace(plan, partition=partition)
    if "num_ranks" not in said:
        plan = replace(plan, num_ranks=_count_ranks(plan))
    if plan.policies is None:
        plan = replace(plan, policies=plan.block_policies, recompute_ratio=0.0)
    if plan.is_closed:
        plan.check()
        plan = replace(plan, stages_per_rank=plan.cut.num_stages // plan.sizes[0])
    return plan


def _count_ranks(plan: Plan) -> int:
    """Count the ranks that the stages of a plan lie on, as its schedule holds them."""
    per_rank = plan.stages_per_rank or plan.entry.default_stages_per_rank
    if plan.cut.num_stages % per_rank or not plan.cut.num_stages:
        raise PlanError(
            f"partition {list(plan.cut)} has {plan.cut.num_stages} stages, which are no multiple of stages_per_rank "
            f"{per_rank}; give num_ranks and as many stages as it holds"
        )
    return plan.cut.num_stages // per_rank


def _plain(value: object) -> object:
    if isinstance(value, RankTimes):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value
