"""From a run and a profile to a run with nothing left open."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vpipe.config import RunConfig, build_config
from vpipe.config.planning.planned import build_request, decide, name_schedules, own_counts, sizes_needed
from vpipe.config.planning.to_plan import with_plan
from vpipe.errors import ConfigError, PlanError
from vpipe.planner.profile.profile import BlockProfile, Profile, SizeProfile

RUN: dict[str, Any] = {
    "model": {"num_layers": 4, "hidden_size": 16},
    "data": {"synthetic_data": True},
    "pipeline": {"num_ranks": 3, "num_microbatches": 6},
    "train": {"batch_size": 12, "iterations": 3},
}


def run_with(*overrides: str) -> RunConfig:
    return build_config(RUN, overrides=overrides)


def profile_of(num_blocks: int = 9) -> Profile:
    """A chain whose last block takes three times as long as the others."""

    def blocks(samples: int) -> tuple[BlockProfile, ...]:
        times = [1.0 * samples] * (num_blocks - 1) + [3.0 * samples]
        return tuple(
            BlockProfile(
                name=f"block.{index}",
                forward_ms=time,
                input_grad_ms=time,
                weight_grad_ms=time,
                recompute_ms=time,
                activation_bytes=1000 * samples,
                input_bytes=100 * samples,
                output_bytes=100 * samples if index < num_blocks - 1 else 0,
                parameter_bytes=500,
            )
            for index, time in enumerate(times)
        )

    return Profile("toy", {}, tuple(SizeProfile(samples, blocks(samples)) for samples in (1, 2)))


def planned(*overrides: str) -> RunConfig:
    run = run_with(*overrides)
    result = with_plan(run, decide(run, profile_of()).plan)
    # What was planned is a run that can be written and read again.
    assert build_config(result.model_dump(mode="json")) == result
    return result


def test_auto_cuts_by_time() -> None:
    run = planned("plan.partition=auto")
    assert run.plan.partition == [4, 4, 1]
    assert run.plan.policies == ["keep"] * 9
    assert not run.needs_plan


def test_named_cuts_and_lists_are_kept() -> None:
    assert planned("plan.partition=compute").plan.partition == [4, 4, 1]
    assert planned("plan.partition=uniform", "plan.memory_limit=1GiB").plan.partition == [3, 3, 3]
    run = planned("plan.partition=[5,2,2]", "plan.memory_limit=1GiB", "pipeline.recompute_ratio=1")
    assert (run.plan.partition, run.plan.policies, run.recompute_ratios) == ([5, 2, 2], None, [1.0, 1.0, 1.0])


def test_a_schedule_is_chosen_for_named_cuts_and_for_lists() -> None:
    names = [[3, 3, 3], [2, 2, 2, 1, 1, 1]]
    assert planned("pipeline.schedule=auto").plan.partition in names
    assert planned("pipeline.schedule=auto", "plan.partition=[3,3,3]").pipeline.stages_per_rank == 1
    run = planned("pipeline.schedule=auto", "plan.partition=[2,2,2,1,1,1]")
    assert (run.pipeline.stages_per_rank, run.plan.partition) == (2, [2, 2, 2, 1, 1, 1])
    assert planned("pipeline.schedule=auto", "pipeline.recompute_ratio=1").pipeline.recompute_ratio == 1
    with pytest.raises(ConfigError, match=r"has 4 entries for 3 stages"):
        run_with("pipeline.schedule=auto", "plan.partition=[4,3,1,1]")
    with pytest.raises(PlanError, match=r"recompute_ratio has 3 entries for 6 stages"):
        decide(
            run_with("pipeline.schedule=auto", "plan.partition=[2,2,2,1,1,1]", "pipeline.recompute_ratio=[1,0,0]"),
            profile_of(),
        )


def test_only_a_planned_run_recomputes_ahead_by_itself() -> None:
    cut, slow = "plan.partition=[6,2,1]", "pipeline.recompute_ratio=[0,0.5,1]"
    assert decide(run_with(cut, slow), profile_of()).chosen.ahead == ()
    run = planned(cut, slow, "plan.memory_limit=1GiB")
    assert run.plan.recompute_ahead
    told = decide(run_with(cut, slow, "plan.memory_limit=1GiB", "plan.recompute_ahead=[1]"), profile_of()).chosen
    assert told.ahead == (1,)


def test_microbatches_and_schedule() -> None:
    run = planned("pipeline.num_microbatches=auto", "pipeline.schedule=auto", "plan.partition=auto")
    assert run.pipeline.num_microbatches in (6, 12)
    assert run.pipeline.schedule in name_schedules("auto")
    stages = run.num_ranks * run.pipeline.stages_per_rank
    assert isinstance(run.plan.partition, list)
    assert len(run.plan.partition) == stages


def test_a_limit_makes_blocks_recompute_and_is_refused_when_nothing_can_keep_it() -> None:
    run = planned("plan.partition=auto", "plan.memory_limit=14kB")
    assert run.plan.policies is not None
    assert "recompute" in run.plan.policies
    for overrides, words in (
        (["plan.partition=auto"], "cannot be kept: the smallest that can is"),
        (["plan.partition=[3,3,3]"], "cannot be kept with partition [3, 3, 3]: the smallest"),
        (["pipeline.recompute_ratio=0.4"], "with partition [3, 3, 3] and what it recomputes: the smallest"),
    ):
        with pytest.raises(PlanError) as error:
            planned(*overrides, "plan.memory_limit=5kB")
        assert words in str(error.value)
        least = str(error.value).split("the smallest that can is ")[1].split(" ")[0]
        planned(*overrides, f"plan.memory_limit={least}")
        with pytest.raises(PlanError):
            planned(*overrides, f"plan.memory_limit={int(least) - 1}")


def test_messages_need_the_room_that_they_have_in_sockets_or_on_a_gpu() -> None:
    run, profile = run_with("pipeline.schedule=1f1b"), profile_of()
    on_gpu = replace(profile, machine={**profile.machine, "device": "NVIDIA L4"})
    assert not build_request(run, profile).sockets
    assert build_request(run, on_gpu).sockets  # whoever leaves the backend open gets nccl there
    assert build_request(run_with("pipeline.schedule=1f1b", "launch.shared_memory=false"), profile).sockets


def test_never_recompute_is_kept() -> None:
    # Without recomputation only swapping is left, and this profile has no host memory.
    with pytest.raises(PlanError, match="cannot be kept"):
        planned("plan.partition=uniform", "pipeline.recompute=never", "plan.memory_limit=14kB")

    run = planned("plan.partition=auto", "pipeline.recompute=never")
    assert run.plan.policies == ["keep"] * 9


def test_what_keeps_the_last_microbatch_is_not_predicted() -> None:
    run = run_with("pipeline.schedule=gpipe", "pipeline.recompute=except_last")
    with pytest.raises(PlanError, match="'except_last' keeps a batch's last microbatch whole, which is not predicted"):
        decide(run, profile_of())


def test_sizes_needed() -> None:
    assert sizes_needed(run_with(), own_counts(run_with())) == (2,)
    assert sizes_needed(run_with(), [12, 6]) == (1, 2)
    assert sizes_needed(run_with(), None) == (1, 2)
    with pytest.raises(PlanError, match="cannot be cut into 5 equal microbatches"):
        sizes_needed(run_with(), [5])


def test_a_profile_of_another_model_is_refused() -> None:
    run = run_with("plan.partition=auto")
    with pytest.raises(PlanError, match="of a model of 8 blocks, and the run's has 9"):
        decide(run, profile_of(8))
