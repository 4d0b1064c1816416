"""A sweep's folder: nothing is lost, nothing overwritten, and it goes on where it was."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from sweep_toys import resolved, row_of, write_config

from vpipe.errors import ConfigError
from vpipe.report.sweep.store import SweepStore

WHAT = {"config": "run.yml", "overrides": ["seed=1"], "simulate": False}


def test_rows_are_on_disk_as_soon_as_they_are_added(tmp_path: Path) -> None:
    combinations = resolved(write_config(tmp_path), "batch_size=8,16")
    store = SweepStore(tmp_path / "out", combinations, WHAT)
    store.add(row_of(combinations[1], 20.0))
    again = SweepStore(tmp_path / "out", combinations, WHAT)
    assert again.rows == store.rows
    again.add(row_of(combinations[0], 10.0))
    assert [each.values[0] for each, _ in again.in_order()] == ["8", "16"]
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [(row["batch_size"], row["samples_per_second"]) for row in rows] == [("8", "10.0"), ("16", "20.0")]
    assert (tmp_path / "out" / "plot.svg").read_text().startswith("<svg")


def test_a_later_row_of_a_combination_counts(tmp_path: Path) -> None:
    (combination,) = resolved(write_config(tmp_path), "batch_size=8")
    store = SweepStore(tmp_path / "out", [combination], WHAT)
    store.add(row_of(combination, error="the machine was busy"))
    store.add(row_of(combination, 3.0))
    again = SweepStore(tmp_path / "out", [combination], WHAT)
    assert again.rows[combination.values].metrics == {"samples_per_second": 3.0}


def test_a_line_that_was_cut_short_is_forgotten(tmp_path: Path) -> None:
    combinations = resolved(write_config(tmp_path), "batch_size=8,16")
    SweepStore(tmp_path / "out", combinations, WHAT).add(row_of(combinations[0], 1.0))
    with (tmp_path / "out" / "rows.jsonl").open("a") as file:
        file.write('{"values": ["16"], "fing')
    again = SweepStore(tmp_path / "out", combinations, WHAT)
    assert list(again.rows) == [("8",)]
    again.add(row_of(combinations[1], 2.0))
    assert list(SweepStore(tmp_path / "out", combinations, WHAT).rows) == [("8",), ("16",)]


def test_another_sweep_is_not_overwritten(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    SweepStore(tmp_path / "out", resolved(path, "batch_size=8,16"), WHAT)
    with pytest.raises(ConfigError) as error:
        SweepStore(tmp_path / "out", resolved(path, "batch_size=8,32"), WHAT)
    assert str(error.value) == (
        f"--output {tmp_path}/out: holds another sweep, run.yml --over batch_size=8,16 --set seed=1 (run); choose "
        "another folder, or repeat that sweep to go on with it"
    )
    with pytest.raises(ConfigError, match="holds another sweep"):
        SweepStore(tmp_path / "out", resolved(path, "batch_size=8,16"), {**WHAT, "simulate": True})


def test_results_of_another_configuration_are_not_mixed(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    combinations = resolved(path, "batch_size=8,16")
    SweepStore(tmp_path / "out", combinations, WHAT).add(row_of(combinations[1], 1.0))
    path.write_text(path.read_text().replace("num_layers: 4", "num_layers: 5"))
    with pytest.raises(ConfigError, match="its result of batch_size=16 is of another configuration"):
        SweepStore(tmp_path / "out", resolved(path, "batch_size=8,16"), WHAT)


@pytest.mark.parametrize("content", ["file", "folder"])
def test_what_is_no_sweep_is_left_alone(tmp_path: Path, content: str) -> None:
    combinations = resolved(write_config(tmp_path), "batch_size=8,16")
    place = tmp_path / "mine"
    if content == "file":
        place.write_text("x")
    else:
        place.mkdir()
        (place / "notes.txt").write_text("x")
    with pytest.raises(
        ConfigError, match=rf"--output {place}: (cannot be used: Not a directory|is not empty and holds)"
    ):
        SweepStore(place, combinations, WHAT)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    SweepStore(tmp_path / "out", resolved(write_config(tmp_path), "seed=1"), WHAT)
    assert (tmp_path / "out" / "sweep.json").exists()


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    combinations = resolved(write_config(tmp_path), "seed=1")
    SweepStore(tmp_path / "out", combinations, WHAT)
    (tmp_path / "out" / "rows.jsonl").write_text("nonsense\n")
    with pytest.raises(ConfigError, match=r"rows\.jsonl, line 1: is no row of a sweep"):
        SweepStore(tmp_path / "out", combinations, WHAT)
    (tmp_path / "out" / "sweep.json").write_text("nonsense")
    with pytest.raises(ConfigError, match=r"sweep\.json"):
        SweepStore(tmp_path / "out", combinations, WHAT)
