"""What a run will do, for `plan.json`: what is cut where, and what every cut costs."""

from __future__ import annotations

from typing import Any

import torch

from vpipe.plan.plan import Plan
from vpipe.plan.plan_file import plan_to_dict
from vpipe.plan.prediction import Prediction
from vpipe.workload.setup import Setup

__all__ = ["describe_plan"]


def describe_plan(plan: Plan, setup: Setup, prediction: Prediction | None = None) -> dict[str, Any]:
    """Return the plan as a plan file, with its stages and cuts; it can be the `plan.partition` of another run.

    Bytes are those of one microbatch, the largest.
    """
    return plan_to_dict(
        plan,
        microbatch_size=setup.config.microbatch_size if setup.config.is_even else None,
        prediction=prediction,
        ratios=setup.config.recompute_ratios if setup.config.plan.policies is None else None,
        stages=_stages(plan, setup),
        cuts=_cuts(plan, setup),
    )


def _stages(plan: Plan, setup: Setup) -> list[dict[str, Any]]:
    counts = setup.chain.count_parameters()
    return [
        {
            "stage": stage,
            "rank": plan.sample.position_of(stage),
            "first_block": start,
            "blocks": [block.name for block in setup.chain.blocks[start:stop]],
            "parameters": sum(counts[start:stop]),
        }
        for stage, (start, stop) in enumerate(plan.cut.ranges)
    ]


def _cuts(plan: Plan, setup: Setup) -> list[dict[str, Any]]:
    size = setup.config.microbatch_size
    fields = {
        name: torch.empty((size, *spec.shape_per_sample), dtype=spec.dtype, device="meta")
        for name, spec in setup.source.fields.items()
    }
    crossing = setup.chain.infer(plan.cut.cuts, fields)
    return [
        {
            "before_stage": stage,
            "values": [value.name for value in crossing[cut]],
            "forward_bytes": sum(value.num_bytes for value in crossing[cut]),
            "backward_bytes": sum(value.num_bytes for value in crossing[cut] if value.requires_grad),
        }
        for stage, cut in enumerate(plan.cut.cuts, start=1)
    ]
