"""Which runs a profile is of, and which it only may be planned with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vpipe.config import RunConfig, build_config
from vpipe.config.load import read_config
from vpipe.config.planning.profiled import check_profile_fits, describe_host, model_keys, profile_warnings
from vpipe.errors import PlanError
from vpipe.planner.profile.profile import BlockProfile, Profile, SizeProfile

RUN: dict[str, Any] = {
    "model": {"num_layers": 1, "hidden_size": 16},
    "data": {"synthetic_data": True},
    "train": {"iterations": 3},
}


def run_with(*overrides: str) -> RunConfig:
    return build_config(RUN, overrides=overrides)


def profile_of(run: RunConfig, **machine: str) -> Profile:
    blocks = tuple(BlockProfile(f"block.{index}", *[1.0] * 4, 1, 1, 1, 1) for index in range(3))
    return Profile("toy", describe_host(run, 1) | machine, (SizeProfile(1, blocks),), made_of=model_keys(run))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.hidden_size=64", "model.hidden_size = 16, and the run has 64"),
        ("model.dropout=0", "model.dropout = 0.1, and the run has 0"),
        ("data.sequence_length=64", "data.sequence_length = 128, and the run has 64"),
        ("optimizer.name=lamb", "optimizer.name = 'adamw', and the run has 'lamb'"),
        ("model.num_layers=2", "is of a model of 3 blocks, and the run's has 5"),
    ],
)
def test_another_model_is_refused(change: str, words: str) -> None:
    with pytest.raises(PlanError, match="measure again with `vpipe profile`, or change the run") as error:
        check_profile_fits(run_with(change), profile_of(run_with()), "p.json")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        "optimizer.learning_rate=3",
        "optimizer.weight_decay=0.1",
        "seed=4",
        "data.synthetic_samples=8",
        "train.epochs=null",
    ],
)
def test_what_costs_no_time_may_differ(change: str) -> None:
    check_profile_fits(run_with(change), profile_of(run_with()), "p.json")
    assert model_keys(run_with(change)) == model_keys(run_with())


def test_the_code_of_an_entry_counts_and_its_folder_does_not(tmp_path: Path) -> None:
    def custom(folder: str, code: str) -> RunConfig:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "mine.py").write_text(code)
        entries = {name: {"type": "custom", "entry": "mine.py:make"} for name in ("model", "data")}
        return build_config({**RUN, **entries}, tmp_path / folder)

    profile = profile_of(custom("one", "x = 1"))
    check_profile_fits(custom("two", "x = 1"), profile, "p.json")
    with pytest.raises(PlanError, match=r"with the code of model\.entry = [0-9a-f]{12}, and the run has [0-9a-f]{12}"):
        check_profile_fits(custom("two", "x = 2"), profile, "p.json")


def test_another_machine_is_told() -> None:
    run = run_with("pipeline.num_ranks=2", "pipeline.num_microbatches=2")
    assert profile_warnings(run, profile_of(run), 1, "p.json") == []
    (warning,) = profile_warnings(run, profile_of(run, processor="Abacus", vpipe="0.0.1"), 3, "p.json")
    assert warning.startswith("p.json was measured with processor Abacus (here ")
    assert "threads_per_rank 1 (here 3), vpipe 0.0.1 (here " in warning


def test_where_swapped_memory_goes_is_of_the_machine(tmp_path: Path) -> None:
    run = run_with()
    elsewhere = run_with(f"plan.swap_directory={tmp_path}")
    (warning,) = profile_warnings(elsewhere, profile_of(run), 1, "p.json")
    assert f"(here {tmp_path})" in warning


def test_a_prediction_of_another_model_is_left_out_and_told(tmp_path: Path) -> None:
    predicted = {"step_ms": 1.0, "memory_bytes": [{"total": 1}], "made_of": model_keys(run_with())}
    (tmp_path / "p.json").write_text(json.dumps({"partition": [3], "predicted": predicted}))
    (tmp_path / "run.yml").write_text(json.dumps({**RUN, "plan": {"partition": "p.json"}}))
    assert read_config(tmp_path / "run.yml").config.plan.predicted == predicted
    run, warnings = read_config(tmp_path / "run.yml", ["model.hidden_size=64"])
    assert run.plan.predicted is None
    assert "was planned with model.hidden_size = 16, and the run has 64" in warnings[-1]
