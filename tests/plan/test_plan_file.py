"""The plan file: ours is the original's with more beside it, and either is read."""

from __future__ import annotations

import json

import pytest
from plan_toys import uniform_profile

from vpipe.errors import PlanError
from vpipe.plan.memory import Policy
from vpipe.plan.plan_file import parse_plan_file, plan_to_dict, trailing_policies
from vpipe.plan.search import Request, find_plan, judge_partition

KEEP, AGAIN, SWAP = Policy.KEEP, Policy.RECOMPUTE, Policy.SWAP


def test_what_is_written_is_read() -> None:
    profile = uniform_profile(6)
    policies = (KEEP, AGAIN, KEEP, SWAP, AGAIN, AGAIN)
    plan = judge_partition(Request(profile, 2, 4), [4, 2], policies)
    content = plan_to_dict(plan, profile, 12.5)
    found = parse_plan_file(json.dumps(content))
    assert found.partition == (4, 2)
    assert found.policies == policies
    assert found.recompute_ratio == (0.25, 1.0)
    assert content["predicted"]["lower_bound_ms"] == 12.5
    assert content["predicted"]["memory_bytes"][0]["total"] == plan.memory[0].total
    assert [stage["blocks"] for stage in content["stages"]] == [
        ["block.0", "block.1", "block.2", "block.3"],
        ["block.4", "block.5"],
    ]


def test_the_depths_of_a_plan_are_written() -> None:
    profile = uniform_profile(4)
    plan = find_plan(Request(profile, 2, 8, options={"depths": [3, 1], "vertical_sync": True})).best
    assert plan_to_dict(plan, profile)["stage_to_depth_map"] == [3, 1]


def test_the_originals_files_are_read() -> None:
    found = parse_plan_file('{"partition": [4, 3, 3], "recompute_ratio": [0.5, 0, 0.34]}')
    assert found.partition == (4, 3, 3)
    assert found.policies == (KEEP, KEEP, AGAIN, AGAIN, KEEP, KEEP, KEEP, KEEP, KEEP, AGAIN)
    assert parse_plan_file('{"partition": [1, 2]}').policies == (KEEP, KEEP, KEEP)


@pytest.mark.parametrize("size", range(1, 60))
def test_ratios_of_a_plan_mean_its_counts(size: int) -> None:
    profile = uniform_profile(size + 1)
    for count in {0, 1, size // 2, size}:
        policies = [KEEP] * (size - count) + [AGAIN] * count + [KEEP]
        plan = judge_partition(Request(profile, 2, 2), [size, 1], policies)
        assert trailing_policies([size, 1], plan.recompute_ratio) == tuple(policies)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "p.json: has no 'partition'"),
        ("{", "p.json: is not JSON"),
        ('{"partition": [1, 0]}', "partition = [1, 0] is not a list"),
        ('{"partition": [1, true]}', "is not a list with a whole number"),
        ('{"partition": [1, 2], "recompute_ratio": [1]}', "recompute_ratio = [1] is not a list"),
        ('{"partition": [1, 2], "recompute_ratio": [1, 2]}', "a number from 0 to 1 per stage"),
        ('{"partition": [1, 2], "policies": ["keep"]}', "one of keep, recompute, swap per block (3)"),
        ('{"partition": [1, 1], "policies": ["keep", "burn"]}', "policies has 'burn' for block 1"),
    ],
)
def test_wrong_files_are_refused(text: str, words: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan_file(text, "p.json")
    assert words in str(caught.value)
