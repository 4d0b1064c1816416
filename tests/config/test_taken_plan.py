"""What a run takes from a plan file, and which keys of its own it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vpipe.config import dump_config, load_config
from vpipe.config.load import LoadedConfig, read_config
from vpipe.errors import ConfigError

RUN: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 16},
    "data": {"synthetic_data": True},
    "plan": {"partition": "p.json"},
    "train": {"iterations": 3},
}
PLAN: dict[str, Any] = {
    "partition": [2, 1, 1, 1],
    "recompute_ratio": [0.5, 0, 0, 0],
    "policies": ["keep", "recompute", "keep", "keep", "keep"],
    "schedule": "zb-v",
    "num_microbatches": 4,
    "microbatch_size": 2,
    "stages_per_rank": 2,
    "recompute_ahead": [0],
    "predicted": {"step_ms": 12.5, "memory_bytes": [{"total": 100}, {"total": 200}]},
    "profile": "ab",
}


def read(folder: Path, plan: dict[str, Any], *overrides: str, **sections: Any) -> LoadedConfig:
    (folder / "p.json").write_text(json.dumps(plan))
    (folder / "run.yml").write_text(json.dumps(RUN | sections))
    config, warnings = read_config(folder / "run.yml", overrides)
    return LoadedConfig(config, tuple(text for text in warnings if "ranks waits for" not in text))


def test_a_run_that_says_nothing_else_is_what_was_planned(tmp_path: Path) -> None:
    run, warnings = read(tmp_path, PLAN)
    assert warnings == ()
    pipeline = run.pipeline
    assert (pipeline.schedule, pipeline.num_ranks, pipeline.stages_per_rank) == ("zb-v", 2, 2)
    assert (run.num_microbatches, run.train.batch_size) == (4, 8)
    assert (run.plan.partition, run.plan.policies, run.plan.recompute_ahead) == ([2, 1, 1, 1], PLAN["policies"], [0])
    assert run.plan.predicted == PLAN["predicted"]
    assert not run.needs_plan
    (tmp_path / "again.yml").write_text(dump_config(run))
    assert load_config(tmp_path / "again.yml") == run


def test_what_is_auto_is_open_and_what_is_equal_is_no_conflict(tmp_path: Path) -> None:
    own = {"schedule": "auto", "num_microbatches": "auto", "num_ranks": 2, "stages_per_rank": 2}
    run, warnings = read(tmp_path, PLAN, pipeline=own)
    assert (run.pipeline.schedule, run.num_microbatches, warnings) == ("zb-v", 4, ())
    assert run.plan.predicted is not None


def test_depths_and_the_rule_of_versions_are_taken(tmp_path: Path) -> None:
    plan = {"partition": [3, 2], "schedule": "pipedream", "num_microbatches": 4, "microbatch_size": 2}
    more = {"stage_to_depth_map": [3, 1], "vertical_sync": True, "swap_versions": [0]}
    run, warnings = read(tmp_path, plan | more)
    assert warnings == ()
    assert (run.pipeline.stage_to_depth_map, run.pipeline.vertical_sync) == ([3, 1], True)
    assert (run.plan.swap_versions, run.plan.predicted) == ([0], None)


def test_what_the_run_says_otherwise_counts_and_is_told(tmp_path: Path) -> None:
    plan = PLAN | {"partition": [3, 2], "stages_per_rank": 1, "schedule": "1f1b", "recompute_ratio": [0.3, 0]}
    run, warnings = read(tmp_path, plan, "pipeline.num_microbatches=2", "train.batch_size=16")
    assert (run.num_microbatches, run.train.batch_size, run.plan.predicted) == (2, 16, None)
    assert warnings == tuple(
        f"plan.partition = {tmp_path / 'p.json'} was planned for {key} = {planned}, and the run has {own}, which "
        f"counts: the prediction does not hold; leave {key} out{auto} to run the plan"
        for key, planned, own, auto in (
            ("pipeline.num_microbatches", 4, 2, ", or say auto,"),
            ("train.batch_size", 8, 16, ""),
        )
    )
    run, (warning,) = read(tmp_path, plan, "pipeline.recompute_ratio=1")
    assert (run.plan.policies, run.recompute_ratios, run.plan.predicted) == (None, [1.0, 1.0], None)
    assert "pipeline.recompute_ratio = 1 of the run counts instead" in warning


def test_another_schedule_takes_the_cut_and_leaves_what_is_of_the_planned_one(tmp_path: Path) -> None:
    plan = PLAN | {"partition": [3, 2], "stages_per_rank": 1, "schedule": "1f1b", "stage_to_depth_map": [3, 1]}
    run, (warning,) = read(tmp_path, plan | {"recompute_ratio": [0.3, 0]}, "pipeline.schedule=gpipe")
    assert "was planned for pipeline.schedule = '1f1b', and the run has 'gpipe'" in warning
    assert (run.plan.partition, run.pipeline.stage_to_depth_map, run.plan.recompute_ahead) == ([3, 2], None, [])


def test_the_originals_file_leaves_all_other_keys_alone(tmp_path: Path) -> None:
    run, _ = read(tmp_path, {"partition": [3, 2], "recompute_ratio": [0.3, 0]})
    assert (run.pipeline.schedule, run.train.batch_size, run.recompute_ratios) == ("1f1b", 32, [0.3, 0.0])
    assert run.plan.predicted is None


def test_recompute_true_keeps_the_policies_of_a_plan(tmp_path: Path) -> None:
    run, warnings = read(tmp_path, PLAN, "recompute=true")
    assert (run.plan.policies, run.pipeline.recompute, warnings) == (PLAN["policies"], None, ())


@pytest.mark.parametrize("predicted", [{"step_ms": "x", "memory_bytes": [{"total": 1}] * 2}, {"step_ms": 1}])
def test_a_broken_prediction_is_refused(tmp_path: Path, predicted: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"plan\.predicted has "):
        read(tmp_path, PLAN | {"predicted": predicted})


def test_what_recomputes_for_all_but_the_last_microbatch_is_taken_with_its_schedule(tmp_path: Path) -> None:
    plan = {
        "partition": [3, 2],
        "recompute_ratio": [1, 1],
        "recompute": "except_last",
        "schedule": "gpipe",
        "num_microbatches": 4,
        "microbatch_size": 2,
        "stages_per_rank": 1,
    }
    run, _ = read(tmp_path, plan)
    assert (run.pipeline.schedule, run.pipeline.recompute) == ("gpipe", "except_last")
    own, warnings = read(tmp_path, plan, "pipeline.schedule=1f1b")
    assert (own.pipeline.recompute, own.recompute_ratios) == (None, [1.0, 1.0])
    assert len(warnings) == 1


def test_what_stages_do_besides_by_the_run_counts_and_is_told(tmp_path: Path) -> None:
    run, warnings = read(tmp_path, PLAN, "plan.recompute_ahead=[1]")
    assert (run.plan.recompute_ahead, run.plan.predicted) == ([1], None)
    assert "was planned for plan.recompute_ahead = [0], and the run has [1], which counts" in warnings[0]
    run, warnings = read(tmp_path, PLAN | {"recompute_ahead": []}, "plan.recompute_ahead=[]")
    assert (run.plan.predicted is None, warnings) == (False, ())


def test_under_a_limit_of_the_run_what_recomputes_is_the_planners_to_say(tmp_path: Path) -> None:
    plan = PLAN | {"schedule": "gpipe", "stages_per_rank": 1, "recompute": "except_last", "recompute_ahead": []}
    run, warnings = read(tmp_path, plan, "plan.memory_limit=1GiB")
    assert (run.pipeline.recompute, run.plan.policies, run.needs_plan) == (None, None, True)
    assert "plan.memory_limit = '1GiB' of the run counts instead" in warnings[0]


def test_a_mode_of_recomputing_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recompute = 'allways' is none of always, except_last, never; did you mean"):
        read(tmp_path, PLAN | {"recompute": "allways"})
    never = PLAN | {"recompute": "never", "recompute_ahead": []}
    run, _ = read(tmp_path, never)
    assert run.plan.policies == ["keep"] * 5
    run, _ = read(tmp_path, never | {"policies": None})
    assert (run.plan.policies, run.recompute_ratios) == (None, [0.0] * 4)
