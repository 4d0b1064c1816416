"""`pipeline.schedule` may be a CSV file: found beside the run's file, and checked like a family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vpipe.config import build_config, dump_config, load_config
from vpipe.errors import ConfigError
from vpipe.schedule.csv_form import to_csv
from vpipe.schedule.registry import build_schedule


def _run(**pipeline: Any) -> dict[str, Any]:
    return {
        "model": {"num_layers": 4, "hidden_size": 64, "num_heads": 2},
        "data": {"synthetic_data": True},
        "pipeline": {"schedule": "order.csv", "num_ranks": 2, "num_microbatches": 4} | pipeline,
        "train": {"batch_size": 8, "iterations": 3},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "order.csv").write_text(to_csv(build_schedule("zb-v", 2, 4)))
    (tmp_path / "stale.csv").write_text(to_csv(build_schedule("pipedream", 2, 4)))
    return tmp_path


def test_it_starts_from_the_folder_of_the_run(folder: Path) -> None:
    config = build_config(_run(), folder)
    assert config.pipeline.schedule == str(folder / "order.csv")
    assert (config.pipeline.stages_per_rank, config.num_stages) == (2, 4)
    (folder / "run.yml").write_text(dump_config(config))
    assert load_config(folder / "run.yml") == config


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ({"schedule": "other.csv"}, r"pipeline\.schedule '.*other\.csv' cannot be read"),
        ({"schedule": "stale.csv"}, r"pipeline\.schedule '.*stale\.csv' updates without a barrier"),
        ({"num_microbatches": 8}, r"order\.csv' has num_microbatches=4, got num_microbatches=8"),
        ({"stages_per_rank": 1}, r"order\.csv' has stages_per_rank=2, got stages_per_rank=1"),
        ({"macrobatch": True}, r"macrobatch = true needs pipeline\.schedule = pipedream or pipedream-2bw, not"),
    ],
)
def test_what_does_not_fit(folder: Path, pipeline: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_config(_run(**pipeline), folder)
