"""The grid of a sweep, and what happens to combinations that fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep_toys import axes, resolved, row_of, write_config

from vpipe.config import RunConfig
from vpipe.errors import ConfigError, LaunchError
from vpipe.report.sweep.sweep import Axis, Combination, Result, combine, parse_axis, run_sweep, short_key


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("batch_size=8,16,32", Axis("batch_size", ("8", "16", "32"))),
        (" plan.partition = uniform , [3, 3, 3] ", Axis("plan.partition", ("uniform", "[3, 3, 3]"))),
        ("pipeline.recompute_ratio=0,[0.3,0,0]", Axis("pipeline.recompute_ratio", ("0", "[0.3,0,0]"))),
        ("pipeline.rank_times={forward: [1, 2]},{}", Axis("pipeline.rank_times", ("{forward: [1, 2]}", "{}"))),
        ("data.data_dir='a,b',c", Axis("data.data_dir", ("'a,b'", "c"))),
        ("seed=1", Axis("seed", ("1",))),
    ],
)
def test_axes(text: str, axis: Axis) -> None:
    assert parse_axis(text) == axis


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_size", "is not of the form key=value,value,..., e.g. batch_size=8,16,32"),
        ("batch_size=", "is not of the form"),
        ("batch_size=8,,16", "is not of the form"),
        ("=8", "is not of the form"),
        ("batch_size=8,16,8", "8 is given twice; give each value once"),
        ("plan.partition=[1,2", "expected ',' or ']'"),
        ("train..x=1", "is not of the form key=value"),
    ],
)
def test_bad_axes(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_axis(text)
    assert message in str(error.value)


def test_axes_of_numbers_and_of_names() -> None:
    assert parse_axis("learning_rate=1e-3,0.01").numbers == (0.001, 0.01)
    assert parse_axis("plan.partition=uniform,[3,3,3]").numbers is None
    assert short_key(parse_axis("plan.partition=uniform")) == "partition"


def test_every_combination_the_last_axis_fastest() -> None:
    found = combine(axes("batch_size=8,16", "recompute_ratio=0,1"))
    assert [each.values for each in found] == [("8", "0"), ("8", "1"), ("16", "0"), ("16", "1")]
    assert found[1].overrides == ("batch_size=8", "recompute_ratio=1")
    assert found[1].label == "batch_size=8  recompute_ratio=1"


def test_one_key_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="--over seed is given twice; give all values at once"):
        combine(axes("seed=1", "seed=2"))


def test_keys_resolve_like_set(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    runs = [each.run for each in resolved(path, "batch_size=8,16", "plan.partition=[2,3,4],parameters")]
    assert [run.train.batch_size for run in runs if run] == [8, 8, 16, 16]
    assert [run.plan.partition for run in runs if run] == [[2, 3, 4], "parameters"] * 2


def test_what_cannot_run_keeps_the_reason(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    good, bad = resolved(path, "batch_size=8,3")
    assert (good.error, bad.run, bad.fingerprint) == ("", None, "")
    assert bad.error.startswith("batch_size = 3 cannot be cut into pipeline.num_microbatches = 4")


def test_fingerprints_are_of_what_runs_and_not_of_where_it_writes(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    first, second = resolved(path, "batch_size=8,16")
    assert first.fingerprint != second.fingerprint
    (elsewhere,) = resolved(path, "log_directory=elsewhere")
    assert elsewhere.fingerprint == first.fingerprint


def test_failures_stop_no_other_and_what_is_kept_is_not_run_again(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    combinations = resolved(path, "batch_size=4,8,3,12,16")
    four, _, _, twelve, _ = combinations
    kept = {four.values: row_of(four, 1.0), twelve.values: row_of(twelve, error="the machine was busy")}
    ran = []

    def execute(combination: Combination, run: RunConfig) -> Result:
        ran.append(run.train.batch_size)
        if run.train.batch_size == 8:
            raise LaunchError("rank 1 was killed\n  logs: here")
        return Result({"samples_per_second": 2.0}, "runs/x")

    rows = [row for _, row in run_sweep(combinations, kept, execute)]
    assert ran == [8, 12, 16]
    assert rows[0] is kept[four.values]
    assert [row.is_done for row in rows] == [True, False, False, True, True]
    assert rows[1].error == "rank 1 was killed\n  logs: here"
    assert rows[2].error.startswith("batch_size = 3")
    assert (rows[4].metrics, rows[4].folder) == ({"samples_per_second": 2.0}, "runs/x")


def test_a_bug_is_no_failure_of_a_combination(tmp_path: Path) -> None:
    def execute(combination: Combination, run: RunConfig) -> Result:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(run_sweep(resolved(write_config(tmp_path), "seed=1,2"), {}, execute))
