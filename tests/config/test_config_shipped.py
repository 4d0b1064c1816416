"""Every shipped config loads, and is what its name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpipe.config import build_config, dump_config, read_config
from vpipe.config.text import parse_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yml"))
THREE = ("vpipe", "pipedream", "gpipe")


def test_all_are_here() -> None:
    names = {f"{size}_4{name}" for size in ("bert", "narrow") for name in THREE}
    assert names | {"quickstart", "gpt_quickstart"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_loads_without_a_warning_and_dumps(path: Path) -> None:
    run, warnings = read_config(path)
    # What GPipe waits is a part of the comparison of three.
    assert all("each of 4 ranks waits for 27% of the time" in text for text in warnings)
    assert bool(warnings) == path.stem.endswith("_4gpipe")
    assert run.data.data_dir == CONFIGS.parent / "data" / "bert"
    assert run.log_directory == CONFIGS.parent / "runs"
    assert build_config(parse_yaml(dump_config(run), "dump")) == run


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("schedule", ["naive", "gpipe", "1f1b", "pipedream"])
def test_runs_any_schedule(path: Path, schedule: str) -> None:
    assert read_config(path, [f"schedule={schedule}"]).config.pipeline.schedule == schedule


def test_quickstart_is_24_narrow_layers_on_two_ranks() -> None:
    run = read_config(CONFIGS / "quickstart.yml").config
    assert (run.num_blocks, run.num_ranks, run.pipeline.schedule) == (49, 2, "1f1b")
    assert run.model.hidden_size <= 128


def test_gpt_quickstart_is_12_narrow_layers_on_two_ranks() -> None:
    run = read_config(CONFIGS / "gpt_quickstart.yml").config
    assert (run.model.type, run.num_blocks, run.num_ranks, run.pipeline.schedule) == ("gpt", 26, 2, "1f1b")


@pytest.mark.parametrize(("name", "schedule"), [("vpipe", "pipedream"), ("pipedream", "pipedream"), ("gpipe", "gpipe")])
def test_bert_large_on_four_local_ranks(name: str, schedule: str) -> None:
    run = read_config(CONFIGS / f"bert_4{name}.yml").config
    assert (run.model.size, run.num_blocks, run.num_ranks, run.pipeline.schedule) == ("large", 49, 4, schedule)
    assert isinstance(run.plan.partition, list)
    assert any(run.recompute_ratios) == (name != "pipedream")


def test_narrow_three_differ_in_schedule_partition_and_recompute_only() -> None:
    runs = [read_config(CONFIGS / f"narrow_4{name}.yml").config for name in THREE]
    assert [run.pipeline.schedule for run in runs] == ["pipedream", "pipedream", "gpipe"]
    same = {"schedule": "gpipe", "recompute": None, "recompute_ratio": 0.0}
    alike = [
        run.model_copy(update={"plan": runs[0].plan, "pipeline": run.pipeline.model_copy(update=same)}) for run in runs
    ]
    assert alike[0] == alike[1] == alike[2]
