"""A small sweep for the tests: two axes, a run for each combination, rows with numbers."""

from __future__ import annotations

from pathlib import Path

from vpipe.report.sweep.sweep import Axis, Combination, Row, combine, parse_axis, resolve

TEXT = """
data: {synthetic_data: true, sequence_length: 16}
model: {num_layers: 4, hidden_size: 32, num_heads: 2, intermediate_size: 64}
pipeline: {num_ranks: 3, num_microbatches: 4}
train: {iterations: 3, batch_size: 8}
"""


def write_config(folder: Path) -> Path:
    """Write the run that is swept."""
    path = folder / "run.yml"
    path.write_text(TEXT)
    return path


def axes(*overs: str) -> list[Axis]:
    """Read axes as `--over` gives them."""
    return [parse_axis(over) for over in overs]


def resolved(path: Path, *overs: str) -> list[Combination]:
    """Return all combinations of the axes with their runs."""
    return [resolve(each, path, []) for each in combine(axes(*overs))]


def row_of(combination: Combination, rate: float | None = None, error: str = "", **metrics: float) -> Row:
    """Return what is kept of a combination."""
    numbers = metrics if rate is None else {"samples_per_second": rate, **metrics}
    return Row(combination.values, combination.fingerprint, numbers, error=error)
