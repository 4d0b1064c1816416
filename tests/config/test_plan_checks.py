"""The keys that leave something to the planner, or say what it would say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vpipe.config import RunConfig, build_config, dump_config
from vpipe.config.text import parse_yaml
from vpipe.errors import ConfigError

RUN: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 16},
    "data": {"synthetic_data": True},
    "pipeline": {"num_ranks": 2, "num_microbatches": 4},
    "train": {"batch_size": 8, "iterations": 3},
}
POLICIES = ["keep", "recompute", "swap", "keep", "keep"]


def run_with(*overrides: str, folder: Path = Path()) -> RunConfig:
    return build_config(RUN, folder, overrides)


@pytest.mark.parametrize(
    ("overrides", "needs_plan"),
    [
        ([], False),
        (["plan.partition=auto"], True),
        (["plan.partition=compute"], True),
        (["plan.partition=parameters"], False),
        (["plan.memory_limit=1GiB"], True),
        (["pipeline.num_microbatches=auto"], True),
        (["pipeline.schedule=auto"], True),
        (["plan.partition=auto", "pipeline.recompute=never"], True),
        (["partition=auto", "memory_limit=1GiB", "num_microbatches=auto", "schedule=auto"], True),
        (["plan.partition=[2,3]", f"plan.policies=[{','.join(POLICIES)}]", "plan.recompute_ahead=[0]"], False),
    ],
    ids=str,
)
def test_what_is_left_open_needs_a_plan(overrides: list[str], needs_plan: bool) -> None:
    run = run_with(*overrides)
    assert run.needs_plan is needs_plan
    assert build_config(parse_yaml(dump_config(run), "dump")) == run


def test_recompute_true_leaves_the_choice_to_the_planner() -> None:
    assert run_with("partition=auto", "recompute=true").pipeline.recompute is None
    assert run_with("partition=auto", "recompute=null").pipeline.recompute is None
    assert run_with("recompute=true").pipeline.recompute == "always"


def test_a_limit_is_a_size() -> None:
    assert run_with("plan.memory_limit=1.5GiB").plan.memory_limit == 3 << 29
    assert run_with("plan.memory_limit=[2kB, 3000]").plan.memory_limit == [2000, 3000]


def test_no_number_of_microbatches_before_the_plan() -> None:
    with pytest.raises(ConfigError, match="auto, and the run has not been planned"):
        _ = run_with("pipeline.num_microbatches=auto").microbatch_size


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["plan.memory_limit=[1,2,3]"],
            "plan.memory_limit has 3 entries for 2 ranks; give one for all, or one per rank",
        ),
        (["plan.memory_limit=much"], "plan.memory_limit = 'much' is not a size such as 4GiB or a number of bytes"),
        (["plan.memory_limit=0"], "plan.memory_limit = 0 is not a size such as 4GiB"),
        (["plan.partition=autp"], "no such file; did you mean 'auto'?"),
        (["pipeline.num_microbatches=aut"], "is not a whole number of at least 1, or 'auto'; did you mean 'auto'?"),
        (["plan.partition=auto", "pipeline.recompute_ratio=0.5"], "or say --set pipeline.recompute_ratio=0"),
        (["plan.partition=auto", "pipeline.recompute=always"], "or say --set pipeline.recompute=null"),
        (
            ["pipeline.schedule=gpipe", "pipeline.recompute=except_last", "plan.memory_limit=1GiB"],
            "pipeline.recompute = 'except_last' keeps a batch's last microbatch whole, which plan.memory_limit",
        ),
        (["plan.partition=auto", f"plan.policies=[{','.join(POLICIES)}]"], "leave plan.policies out"),
        (["plan.policies=[keep]"], "plan.policies has 1 entries for 5 blocks; give one per block"),
        (["plan.policies=[kept]"], "plan.policies = ['kept'] is not a list"),
        (
            [f"plan.policies=[{','.join(POLICIES)}]", "pipeline.recompute_ratio=1"],
            "plan.policies and pipeline.recompute or recompute_ratio say the same thing twice; keep one",
        ),
        (["plan.recompute_ahead=[1,2]"], "plan.recompute_ahead has stage 2; there are stages 0 to 1"),
        (["plan.swap_versions=[2]"], "plan.swap_versions has stage 2; there are stages 0 to 1"),
        (["plan.swap_versions=1"], "plan.swap_versions = 1 is not true, false, null, or a list of stages"),
        (["pipeline.schedule=searched", "plan.partition=auto"], "'searched' is an order for given times"),
        (["pipeline.schedule=auto", "pipeline.vertical_sync=true"], "needs a schedule that has it, not 'auto'"),
    ],
    ids=str,
)
def test_mistakes(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_with(*overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_policies_of_a_plan_file_count_unless_the_run_says_something_itself(tmp_path: Path) -> None:
    content = {"partition": [2, 3], "recompute_ratio": [0.5, 0], "policies": POLICIES, "recompute_ahead": [1]}
    (tmp_path / "plan.json").write_text(json.dumps(content))
    planned = run_with("plan.partition=plan.json", folder=tmp_path)
    assert (planned.plan.partition, planned.plan.policies) == ([2, 3], POLICIES)
    assert planned.plan.recompute_ahead == [1]
    assert planned.recompute_ratios == [0.0, 0.0]
    for own in ("pipeline.recompute_ratio=1", "pipeline.recompute=always"):
        run = run_with("plan.partition=plan.json", own, folder=tmp_path)
        assert (run.plan.policies, run.recompute_ratios) == (None, [1.0, 1.0])
    (tmp_path / "plan.json").write_text(json.dumps(content | {"policies": ["all"]}))
    with pytest.raises(ConfigError, match=r"plan\.policies"):
        run_with("plan.partition=plan.json", folder=tmp_path)


def test_the_weight_versions_of_a_plan_file_move_unless_the_run_says_something_itself(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"partition": [2, 3], "swap_versions": [1]}))
    assert run_with("plan.partition=plan.json", folder=tmp_path).plan.swap_versions == [1]
    own = run_with("plan.partition=plan.json", "plan.swap_versions=false", folder=tmp_path)
    assert own.plan.swap_versions is False
    assert run_with("plan.swap_versions=true").plan.swap_versions is True
