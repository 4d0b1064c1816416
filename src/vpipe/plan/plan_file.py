"""The plan as a file: the original's ``{"partition": ..., "recompute_ratio": ...}`` with more keys beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

from vpipe.errors import PlanError
from vpipe.plan.memory import Policy
from vpipe.plan.partition import recompute_blocks
from vpipe.plan.profile import Profile
from vpipe.plan.situation import Plan

__all__ = ["PlanFile", "parse_plan_file", "plan_to_dict", "trailing_policies"]


@dataclass(frozen=True)
class PlanFile:
    """What a plan file says about blocks; the original's own files have no policies."""

    partition: tuple[int, ...]
    recompute_ratio: tuple[float, ...]
    policies: tuple[Policy, ...]
    """Of every block; without any in the file, what the ratios mean."""


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
        "stages": _stages(plan, profile),
        "predicted": {
            "step_ms": plan.step_ms,
            "sample_ms": plan.sample_ms,
            **({} if lower_bound_ms is None else {"lower_bound_ms": lower_bound_ms}),
            "memory_bytes": [{**asdict(memory), "total": memory.total} for memory in plan.memory],
        },
        "profile": profile.fingerprint,
    }


def parse_plan_file(text: str, source: str = "plan") -> PlanFile:
    """Read the partition and policies of a plan file, or of one of the original's.

    Raises:
        PlanError: it is none; the message names `source` and the key.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise PlanError(f"{source}: is not JSON (line {error.lineno}: {error.msg})") from error
    if not isinstance(content, dict) or "partition" not in content:
        raise PlanError(f"{source}: has no 'partition', a list of blocks per stage, e.g. [12, 13, 13, 11]")
    partition = content["partition"]
    if (
        not isinstance(partition, list)
        or not partition
        or not all(type(size) is int and size > 0 for size in partition)
    ):
        raise PlanError(f"{source}: partition = {partition!r} is not a list with a whole number from 1 on per stage")
    ratios = content.get("recompute_ratio") or [0.0] * len(partition)
    if not isinstance(ratios, list) or len(ratios) != len(partition) or not all(map(_is_ratio, ratios)):
        raise PlanError(f"{source}: recompute_ratio = {ratios!r} is not a list with a number from 0 to 1 per stage")
    policies = trailing_policies(partition, ratios)
    if "policies" in content:
        policies = _read_policies(content["policies"], sum(partition), source)
    return PlanFile(tuple(partition), tuple(map(float, ratios)), policies)


def trailing_policies(partition: Sequence[int], ratios: Sequence[float]) -> tuple[Policy, ...]:
    """Return what recompute ratios mean: the last share of each stage's blocks recomputes, the others keep.

    Raises:
        PlanError: a ratio is outside 0 to 1.
    """
    policies: list[Policy] = []
    for size, ratio in zip(partition, ratios, strict=True):
        count = recompute_blocks(size, ratio)
        policies += [Policy.KEEP] * (size - count) + [Policy.RECOMPUTE] * count
    return tuple(policies)


def _read_policies(names: Any, num_blocks: int, source: str) -> tuple[Policy, ...]:
    known = [policy.value for policy in Policy]
    if not isinstance(names, list) or len(names) != num_blocks:
        raise PlanError(f"{source}: policies is not a list with one of {', '.join(known)} per block ({num_blocks})")
    for block, name in enumerate(names):
        if name not in known:
            raise PlanError(f"{source}: policies has {name!r} for block {block}; use one of {', '.join(known)}")
    return tuple(map(Policy, names))


def _is_ratio(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _stages(plan: Plan, profile: Profile) -> list[dict[str, Any]]:
    blocks = profile.at(plan.setting.microbatch_size).blocks
    costs, stages = plan.costs, []
    placement = plan.setting.build().placement
    for stage, (start, stop) in enumerate(pairwise([0, *accumulate(plan.partition)])):
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
