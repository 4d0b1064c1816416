"""The plan file: ours is the original's with more beside it, and either is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plan_toys import uniform_profile

from vpipe.config.original.files import read_partition_file
from vpipe.plan.policy import Policy, trailing_policies
from vpipe.plan.recipe import Recipe
from vpipe.planner.search.outcome_file import candidate_to_dict
from vpipe.planner.search.search import Request, find_plan, judge_partition

KEEP, AGAIN, SWAP = Policy.KEEP, Policy.RECOMPUTE, Policy.SWAP


def test_what_is_written_is_read(tmp_path: Path) -> None:
    profile = uniform_profile(6)
    policies = (KEEP, AGAIN, KEEP, SWAP, AGAIN, AGAIN)
    plan = judge_partition(Request(profile, 2, 4), [4, 2], policies)
    content = candidate_to_dict(plan, profile, 12.5)
    (tmp_path / "p.json").write_text(json.dumps(content))
    found = read_partition_file(tmp_path / "p.json")
    assert found.partition == [4, 2]
    assert found.policies == [policy.value for policy in policies]
    assert found.recompute_ratio == [0.25, 1.0]
    assert found.run == {
        "pipeline.schedule": "1f1b",
        "pipeline.num_microbatches": plan.setting.num_microbatches,
        "pipeline.stages_per_rank": 1,
        "pipeline.num_ranks": 2,
        "train.batch_size": 4,
    }
    assert found.predicted == content["predicted"]
    assert content["predicted"]["lower_bound_ms"] == 12.5
    assert content["predicted"]["memory_bytes"][0]["total"] == plan.memory[0].total
    assert [stage["blocks"] for stage in content["stages"]] == [
        ["block.0", "block.1", "block.2", "block.3"],
        ["block.4", "block.5"],
    ]


def test_the_planner_returns_a_plan_and_a_prediction() -> None:
    outcome = find_plan(Request(uniform_profile(6), 2, 4))
    assert outcome.plan.is_closed
    assert (outcome.plan.cut, outcome.plan.block_policies) == (outcome.best.partition, outcome.best.policies)
    assert outcome.plan.build().num_microbatches == outcome.best.setting.num_microbatches
    prediction = outcome.prediction
    assert (prediction.step_ms, prediction.lower_bound_ms) == (outcome.best.step_ms, outcome.lower_bound_ms)
    assert [kinds["total"] for kinds in prediction.memory_bytes] == [each.total for each in outcome.best.memory]


def test_the_depths_of_a_plan_are_written() -> None:
    profile = uniform_profile(4)
    plan = find_plan(Request(profile, 2, 8, options=Recipe(depths=[3, 1], vertical_sync=True))).best
    assert candidate_to_dict(plan, profile)["stage_to_depth_map"] == [3, 1]


def test_the_rule_of_weight_versions_of_a_plan_is_written() -> None:
    profile = uniform_profile(4)
    plain = candidate_to_dict(find_plan(Request(profile, 2, 8, ["pipedream"], [8])).best, profile)
    assert not {"macrobatch", "vertical_sync"} & plain.keys()
    for option in ("macrobatch", "vertical_sync"):
        request = Request(profile, 2, 8, ["pipedream"], [8], options=Recipe(**{option: True}))
        assert candidate_to_dict(find_plan(request).best, profile)[option] is True


@pytest.mark.parametrize("size", range(1, 60))
def test_ratios_of_a_plan_mean_its_counts(size: int) -> None:
    profile = uniform_profile(size + 1)
    for count in {0, 1, size // 2, size}:
        policies = [KEEP] * (size - count) + [AGAIN] * count + [KEEP]
        plan = judge_partition(Request(profile, 2, 2), [size, 1], policies)
        assert trailing_policies([size, 1], plan.plan.ratios) == tuple(policies)
