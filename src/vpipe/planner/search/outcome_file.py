"""What the planner found, as a plan file and as data beside it."""

from __future__ import annotations

from typing import Any

from vpipe.plan.plan_file import plan_to_dict
from vpipe.planner.profile.profile import Profile
from vpipe.planner.search.candidate import Candidate
from vpipe.planner.search.search import Outcome

__all__ = ["candidate_to_dict", "outcome_to_dict"]


def candidate_to_dict(candidate: Candidate, profile: Profile, lower_bound_ms: float | None = None) -> dict[str, Any]:
    """Return a candidate's plan and prediction as a plan file; times are predictions in ms, sizes bytes."""
    return plan_to_dict(
        candidate.plan,
        microbatch_size=candidate.setting.microbatch_size,
        prediction=candidate.predict(profile, lower_bound_ms),
        stages=_stages(candidate, profile),
    )


def outcome_to_dict(outcome: Outcome, plan: Candidate) -> dict[str, Any]:
    """Return for JSON what there would be instead of `plan`, what limits it, and the least memory it could do with."""
    stage = max(range(len(plan.stage_ms)), key=plan.stage_ms.__getitem__)
    others = {"best": outcome.best, **dict(zip(["next_best"], outcome.ranked[1:2], strict=False)), **outcome.naive}
    return {
        "bottleneck": {
            "stage": stage,
            "rank": plan.setting.build().position_of(stage),
            "stage_ms": plan.stage_ms[stage],
        },
        "alternatives": {name: _alternative(outcome, other) for name, other in others.items() if other is not plan},
        "smallest_limits": list(outcome.smallest_limits),
    }


def _alternative(outcome: Outcome, plan: Candidate) -> dict[str, Any]:
    return {
        "partition": list(plan.partition),
        "setting": plan.setting.describe(),
        "step_ms": plan.step_ms,
        "sample_ms": plan.sample_ms,
        "fits": plan.fits(outcome.request.usable_limits),
    }


def _stages(plan: Candidate, profile: Profile) -> list[dict[str, Any]]:
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
