"""What a run will do, for `plan.json`: what is cut where, and what every cut costs."""

from __future__ import annotations

from typing import Any

import torch

from vpipe.config import RunConfig
from vpipe.plan.partition import Partition
from vpipe.plan.policy import Policy, ratios_of
from vpipe.runtime.pipeline import Pipeline
from vpipe.schedule.action import Kind
from vpipe.schedule.schedule import Schedule
from vpipe.workload.setup import Setup

__all__ = ["describe_plan"]

_OPTIONS = ("stage_to_depth_map", "macrobatch", "vertical_sync")


def describe_plan(pipeline: Pipeline, setup: Setup) -> dict[str, Any]:
    """Return the plan in the original's keys, `partition` and `recompute_ratio`, with more beside them.

    A file with it can be the `plan.partition` of another run. Bytes are those of one microbatch.
    """
    config, schedule = setup.config, pipeline.programs.sample
    return {
        "partition": list(pipeline.partition),
        **_activations(setup.config, pipeline.partition),
        "schedule": config.pipeline.schedule,
        "synchronous": pipeline.programs.synchronous,
        "num_microbatches": config.num_microbatches,
        "microbatch_size": config.microbatch_size,
        "stages_per_rank": config.pipeline.stages_per_rank,
        **{key: value for key in _OPTIONS if (value := getattr(config.pipeline, key))},
        "depths": [_depth(schedule, stage) for stage in range(schedule.num_stages)],
        "stages": _stages(pipeline, setup),
        "cuts": _cuts(pipeline, setup),
        **({"swap_versions": sorted(pipeline.programs.moving)} if pipeline.programs.moving else {}),
        "fingerprint": schedule.fingerprint(),
    }


def _activations(config: RunConfig, partition: Partition) -> dict[str, Any]:
    """Say what is recomputed: by ratio, which is exact without policies per block, and these where there are any."""
    policies = config.plan.policies
    if policies is None:
        return {"recompute_ratio": config.recompute_ratios}
    ratios = ratios_of(partition, [Policy(name) for name in policies])
    return {"recompute_ratio": list(ratios), "policies": policies, "recompute_ahead": config.plan.recompute_ahead}


def _depth(schedule: Schedule, stage: int) -> int:
    """Count the forwards of a stage ahead of the one that its first backward follows."""
    kinds = [action.kind for action in schedule.stage_order(stage)]
    first = min(kinds.index(kind) for kind in (Kind.B, Kind.I) if kind in kinds)
    return kinds[:first].count(Kind.F) - 1


def _stages(pipeline: Pipeline, setup: Setup) -> list[dict[str, Any]]:
    counts = setup.chain.count_parameters()
    return [
        {
            "stage": stage,
            "rank": pipeline.programs.sample.rank_of(stage),
            "first_block": start,
            "blocks": [block.name for block in setup.chain.blocks[start:stop]],
            "parameters": sum(counts[start:stop]),
        }
        for stage, (start, stop) in enumerate(pipeline.partition.ranges)
    ]


def _cuts(pipeline: Pipeline, setup: Setup) -> list[dict[str, Any]]:
    size = setup.config.microbatch_size
    fields = {
        name: torch.empty((size, *spec.shape_per_sample), dtype=spec.dtype, device="meta")
        for name, spec in setup.source.fields.items()
    }
    cuts = pipeline.partition.cuts
    crossing = setup.chain.infer(cuts, fields)
    return [
        {
            "before_stage": stage,
            "values": [value.name for value in crossing[cut]],
            "forward_bytes": sum(value.num_bytes for value in crossing[cut]),
            "backward_bytes": sum(value.num_bytes for value in crossing[cut] if value.requires_grad),
        }
        for stage, cut in enumerate(cuts, start=1)
    ]
