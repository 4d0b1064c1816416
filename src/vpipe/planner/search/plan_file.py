"""The plan as a file: the original's ``{"partition": ..., "recompute_ratio": ...}`` with more keys beside them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vpipe.planner.profile.profile import Profile
from vpipe.planner.search.search import Outcome
from vpipe.planner.search.situation import Plan

__all__ = ["outcome_to_dict", "plan_to_dict"]

_SWITCHES = {"microbatches_per_update": "macrobatch", "vertical_sync": "vertical_sync"}
"""Options of schedules that a run switches on by a key of another name."""


def plan_to_dict(plan: Plan, profile: Profile, lower_bound_ms: float | None = None) -> dict[str, Any]:
    """Return the plan for JSON; times are predictions in ms, sizes bytes.

    `policies` holds what a ratio cannot say: what every block does, in model order. `recompute_ahead` names the stages
    that recompute before the gradient arrives: the schedule has an R before each of their backwards. `swap_versions`
    names those whose waiting weight versions are in host memory.
    """
    setting = plan.setting
    return {
        "partition": list(plan.partition),
        "recompute_ratio": list(plan.recompute_ratio),
        "policies": [policy.value for policy in plan.policies],
        "schedule": setting.schedule,
        "synchronous": setting.synchronous,
        "num_microbatches": setting.num_microbatches,
        "microbatch_size": setting.microbatch_size,
        "stages_per_rank": len(plan.partition) // setting.num_ranks,
        **({"recompute_ahead": list(plan.ahead)} if plan.ahead else {}),
        **({"swap_versions": list(setting.swap_versions)} if setting.swap_versions else {}),
        **({"stage_to_depth_map": list(setting.depths)} if setting.depths else {}),
        **{name: True for option, name in _SWITCHES.items() if dict(setting.options).get(option)},
        "stages": _stages(plan, profile),
        "predicted": {
            "step_ms": plan.step_ms,
            "sample_ms": plan.sample_ms,
            **({} if lower_bound_ms is None else {"lower_bound_ms": lower_bound_ms}),
            "memory_bytes": [{**asdict(memory), "total": memory.total} for memory in plan.memory],
            **({"made_of": dict(profile.made_of)} if profile.made_of else {}),
        },
        "profile": profile.fingerprint,
    }


def outcome_to_dict(outcome: Outcome, plan: Plan) -> dict[str, Any]:
    """Return for JSON what there would be instead of `plan`, what limits it, and the least memory it could do with."""
    stage = max(range(len(plan.stage_ms)), key=plan.stage_ms.__getitem__)
    others = {"best": outcome.best, **dict(zip(["next_best"], outcome.ranked[1:2], strict=False)), **outcome.naive}
    return {
        "bottleneck": {
            "stage": stage,
            "rank": plan.setting.build().rank_of(stage),
            "stage_ms": plan.stage_ms[stage],
        },
        "alternatives": {name: _alternative(outcome, other) for name, other in others.items() if other is not plan},
        "smallest_limits": list(outcome.smallest_limits),
    }


def _alternative(outcome: Outcome, plan: Plan) -> dict[str, Any]:
    return {
        "partition": list(plan.partition),
        "setting": plan.setting.describe(),
        "step_ms": plan.step_ms,
        "sample_ms": plan.sample_ms,
        "fits": plan.fits(outcome.request.usable_limits),
    }


def _stages(plan: Plan, profile: Profile) -> list[dict[str, Any]]:
    blocks = profile.at(plan.setting.microbatch_size).blocks
    costs, stages = plan.costs, []
    placement = plan.setting.build().placement
    for stage, (start, stop) in enumerate(plan.partition.ranges):
        stages.append(
            {
                "stage": stage,
                "rank": placement.rank_of(stage),
                "first_block": start,
                "blocks": [block.name for block in blocks[start:stop]],
                "forward_ms": costs.forward[stage],
                "backward_ms": plan.stage_ms[stage] - costs.forward[stage],
                "recompute_ms": costs.recompute[stage],
            }
        )
    return stages
