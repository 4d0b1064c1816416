"""What came out of a sweep, for other tools and for a terminal."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.console import Console
from sweep_toys import resolved, row_of, write_config

from vpipe.report.sweep.table import failure_lines, find_best, render_table, table_csv


def shown(table: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_csv_has_keys_numbers_and_reasons(tmp_path: Path) -> None:
    first, second, third = resolved(write_config(tmp_path), "plan.partition=uniform,[2,3,4],[1,1]")
    rows = [
        row_of(first, 10.5, iteration_ms=3.0),
        row_of(second, error="2 errors\n  one\n  two"),
        row_of(third, 11.0, peak_memory_bytes=2048),
    ]
    text = table_csv(first.axes, rows)
    assert text.splitlines() == [
        "plan.partition,samples_per_second,iteration_ms,peak_memory_bytes,folder,error",
        "uniform,10.5,3.0,,,",
        '"[2,3,4]",,,,,2 errors; one; two',
        '"[1,1]",11.0,,2048,,',
    ]
    assert [row["plan.partition"] for row in csv.DictReader(io.StringIO(text))] == ["uniform", "[2,3,4]", "[1,1]"]


def test_terminal_table(tmp_path: Path) -> None:
    first, second, third = resolved(write_config(tmp_path), "train.batch_size=8,12,[a]")
    rows = [
        row_of(first, 10.5, bubble_fraction=0.25, predicted_memory_bytes=3 << 20),
        row_of(second, error="no"),
        row_of(third, 2.0, final_loss=7.5),
    ]
    assert [line.rstrip() for line in shown(render_table(first.axes, rows)).splitlines()] == [
        "batch_size  samples/s  bubble  memory    loss",
        "8                10.5   25.0%   3 MiB       -",
        "12             failed",
        "[a]                 2       -       -  7.5000",
    ]


def test_a_long_value_is_folded_and_not_cut(tmp_path: Path) -> None:
    (combination,) = resolved(write_config(tmp_path), "plan.partition=[" + ",".join(["1"] * 60) + "]")
    text = shown(render_table(combination.axes, [row_of(combination, 1.0)]))
    assert text.count("1,") == 59
    assert "…" not in text


def test_reasons_are_told_once(tmp_path: Path) -> None:
    combinations = resolved(write_config(tmp_path), "seed=1,2,3,4")
    rows = [row_of(each, error=error) for each, error in zip(combinations, ["a", "b\n c", "a", ""], strict=True)]
    axes = combinations[0].axes
    assert failure_lines(axes, rows) == [
        "failed, 2 of 4: a", "  seed=1", "  seed=3", "failed, 1 of 4: b; c", "  seed=2"
    ]  # fmt: skip
    many = [row_of(each, error="a") for each in resolved(write_config(tmp_path), "seed=1,2,3", "batch_size=4,8,12,16")]
    lines = failure_lines(resolved(write_config(tmp_path), "seed=1,2,3", "batch_size=4")[0].axes, many)
    assert lines[1:3] == ["  seed=1  batch_size=4", "  seed=1  batch_size=8"]
    assert lines[9:] == ["  and 4 more, which the table has"]


def test_the_best_is_the_fastest(tmp_path: Path) -> None:
    one, two, three = resolved(write_config(tmp_path), "seed=1,2,3")
    rows = [row_of(one, 1.0), row_of(two, 3.0), row_of(three, error="no")]
    assert find_best(rows) is rows[1]
    assert find_best(rows[2:]) is None
