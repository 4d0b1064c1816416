"""`vpipe estimate` of a run's YAML: what the run says holds, unless an option says otherwise, and is told."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vpipe.cli import main

RUN = """
data: {synthetic_data: true, sequence_length: 16}
model: {type: bert, num_layers: 3, hidden_size: 32, num_heads: 2, vocab_size: 100}
pipeline: {num_ranks: 2, num_microbatches: 4, schedule: gpipe}
plan: {memory_limit: 3MiB}
optimizer: {name: sgd, momentum: 0}
train: {iterations: 3, batch_size: 16}
"""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    (tmp_path / "run.yml").write_text(RUN)

    def call(*arguments: object, text: bool = False) -> Any:
        form = [] if text else ["--format", "json"]
        path = tmp_path / "run.yml"
        monkeypatch.setattr(sys, "argv", ["vpipe", "estimate", "--model", str(path), *form, *map(str, arguments)])
        with suppress(SystemExit):
            main()
        out = capsys.readouterr().out
        return out if text else json.loads(out)

    return call


def test_what_the_run_says_holds(told: Any) -> None:
    content = told()
    estimate = content["estimate"]
    assert (content["schedule"], content["num_microbatches"], content["microbatch_size"]) == ("gpipe", 4, 4)
    assert estimate["assumed"]["memory_limit_bytes"] == 3 << 20
    assert estimate["assumed"]["optimizer_bytes"] == 4  # the master copy; SGD without momentum has no state
    assert estimate["from_run"] == {
        "pipeline.num_ranks": "2",
        "pipeline.schedule": "gpipe",
        "pipeline.num_microbatches": "4",
        "train.batch_size": "16",
        "optimizer.name": "sgd",
        "plan.memory_limit": "3 MiB",
    }


def test_options_win(told: Any) -> None:
    content = told(
        "--schedule", "1f1b", "--microbatch-size", 2, "--memory-limit", "5MiB", "--optimizer-bytes", 8
    )  # fmt: skip
    assert (content["schedule"], content["num_microbatches"]) == ("1f1b", 8)
    assert content["estimate"]["assumed"]["memory_limit_bytes"] == 5 << 20
    assert content["estimate"]["assumed"]["optimizer_bytes"] == 8
    assert content["estimate"]["from_run"] == {"pipeline.num_ranks": "2", "train.batch_size": "16"}


def test_the_text_says_what_came_from_the_run(told: Any) -> None:
    first, *_ = told("--batch-size", 32, text=True).splitlines()
    assert first.startswith("From ")
    assert "pipeline.num_microbatches 4" in first
    assert "train.batch_size" not in first
    assert first.endswith("cuts and policies are planned anew.")
    assert "of the tokens 15% are masked" in told(text=True)
