"""A run of a sweep on paper: what the simulator says of it, from what its blocks were measured to cost."""

from __future__ import annotations

from collections.abc import Sequence

from vpipe.config import RunConfig
from vpipe.errors import PlanError
from vpipe.plan.partition import partition_by_weight, partition_uniform
from vpipe.plan.plan_file import trailing_policies
from vpipe.plan.profile import Profile
from vpipe.plan.search import Request, find_plan, judge_partition
from vpipe.plan.situation import Plan
from vpipe.report.sweep import Result

__all__ = ["simulate_run"]


def simulate_run(config: RunConfig, profile: Profile) -> Result:
    """Return the predicted throughput, bubble and memory of the largest rank; nothing about the loss.

    Raises:
        PlanError: the profile is of another model or other sizes, or the run does not fit together.
        ScheduleError: the schedule cannot be built.
    """
    if config.num_blocks is not None and config.num_blocks != profile.num_blocks:
        raise PlanError(f"the profile is of {profile.num_blocks} blocks, and the run's model has {config.num_blocks}")
    plan = _plan(config, profile)
    busy_ms = sum(plan.stage_ms) * config.num_microbatches
    return Result(
        {
            "samples_per_second": 1e3 / plan.sample_ms,
            "iteration_ms": plan.step_ms,
            "bubble_fraction": max(0.0, 1 - busy_ms / (config.num_ranks * plan.step_ms)),
            "predicted_memory_bytes": max(memory.total for memory in plan.memory),
        }
    )


def _plan(config: RunConfig, profile: Profile) -> Plan:
    pipeline = config.pipeline
    request = Request(
        profile,
        config.num_ranks,
        config.train.batch_size,
        (pipeline.schedule,),
        [config.num_microbatches],
        stages_per_rank=pipeline.stages_per_rank,
        options={**config.schedule_options, "macrobatch": pipeline.macrobatch},
        is_eager=False,
    )
    if config.plan.partition == "auto":
        return find_plan(request).best
    cut = _cut(config, profile)
    ratios = config.recompute_ratios
    return judge_partition(request, cut, trailing_policies(cut, ratios) if len(ratios) == len(cut) else None)


def _cut(config: RunConfig, profile: Profile) -> Sequence[int]:
    partition, num_stages, blocks = config.plan.partition, config.num_stages, profile.sizes[0].blocks
    if isinstance(partition, list):
        return partition
    if partition == "uniform":
        return partition_uniform(len(blocks), num_stages)
    if partition == "parameters":
        return partition_by_weight([block.parameter_bytes for block in blocks], num_stages)
    return partition_by_weight([block.forward_ms + block.backward_ms for block in blocks], num_stages)
