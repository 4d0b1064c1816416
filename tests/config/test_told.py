"""What is said about a run's schedule: its number of microbatches, and what was left out of its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpipe.config import read_config

TEXT = """
model: {type: bert, num_layers: 8, hidden_size: 32, num_heads: 2}
data: {synthetic_data: true, sequence_length: 16}
train: {iterations: 2, batch_size: 32}
pipeline: {num_ranks: 4}
"""


def warnings_of(tmp_path: Path, *overrides: str) -> tuple[str, ...]:
    (tmp_path / "run.yml").write_text(TEXT)
    return read_config(tmp_path / "run.yml", overrides).warnings


def pipeline(**values: object) -> list[str]:
    return [f"pipeline.{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (pipeline(num_microbatches=8), "num_microbatches = 16, which batch_size 32 allows, makes it 16%"),
        (pipeline(num_microbatches=8, schedule="zb-h1"), "for 11% of the time (stages of equal time); num_microb"),
        (pipeline(num_microbatches=8, schedule="naive"), "with 'naive' more microbatches do not make that less"),
        (pipeline(num_microbatches=2, schedule="interleaved", stages_per_rank=2), "num_microbatches = 32, which"),
        ([*pipeline(num_microbatches=4), "train.batch_size=12"], "num_microbatches = 12, which batch_size 12 allows"),
        ([*pipeline(num_microbatches=8), "train.batch_size=8"], "a batch of 8 cannot be cut into more; with a batch_s"),
        (pipeline(schedule="auto"), "num_microbatches is not given, so it is 1; with auto the planner chooses it, too"),
    ],
    ids=str,
)
def test_what_few_microbatches_cost(tmp_path: Path, settings: list[str], expected: str) -> None:
    (told,) = warnings_of(tmp_path, *settings)
    assert expected in told


@pytest.mark.parametrize(
    "settings",
    [
        pipeline(num_microbatches=16),
        pipeline(num_microbatches=2, schedule="pipedream"),
        pipeline(num_microbatches=2, num_ranks=1),
        pipeline(num_microbatches="auto"),
        pipeline(num_microbatches=2, schedule="auto"),
    ],
    ids=str,
)
def test_nothing_is_said_of_enough(tmp_path: Path, settings: list[str]) -> None:
    assert not warnings_of(tmp_path, *settings)


def test_a_file_of_an_order_has_no_more(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    (told,) = warnings_of(tmp_path, *pipeline(num_ranks=2, num_microbatches=2, schedule="own.csv"))
    assert told.endswith("waits for 33% of the time (stages of equal time); the order in the file has no more")


def test_what_is_not_in_the_schedule_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("0F0,0F1,0B1,0B0,0REDUCE_GRAD\n1F0,1F1,1B1,1B0\n")
    notes = warnings_of(tmp_path, *pipeline(num_ranks=2, num_microbatches=2, schedule="own.csv"))[:2]
    assert all(text.startswith("schedule '") for text in notes)
    assert "1 cell of REDUCE_GRAD left out: they are for sharded weights and replicas" in notes[0]
    assert "backwards were put into microbatch order" in notes[1]
