from __future__ import annotations

import pytest

from vpipe.draw.overview import overview, overview_lines
from vpipe.schedule.entry import Entry
from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.schedule import Schedule


def test_every_family_has_a_row_with_its_numbers() -> None:
    rows = {row.schedule: row for row in overview(4, 8)}
    assert list(rows) == list(SCHEDULES)
    assert (rows["1f1b"].bubble_fraction, rows["1f1b"].peak_activations) == (3 / 11, 4)
    assert (rows["pipedream"].weight_versions, rows["pipedream"].staleness) == (4, 3)
    assert not rows["pipedream"].synchronous
    assert rows["naive"].bubble_fraction == 0.75


def test_the_table_names_the_sizes() -> None:
    lines = overview_lines(overview(4, 8), 4, 8)
    assert lines[0].split()[:4] == ["schedule", "update", "bubble", "peak"]
    assert lines[3].split()[:6] == ["1f1b", "sync", "27.3%", "4", "1", "0"]
    assert lines[3].split()[6] == "1"
    assert "4 ranks, for 8 microbatches" in lines[-3]


def test_a_family_that_cannot_run_the_size_is_still_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_picky(num_ranks: int, num_microbatches: int) -> Schedule:
        return build_schedule("gpipe", 0, num_microbatches)

    monkeypatch.setitem(SCHEDULES, "picky", Entry(build_picky, True, "Never."))
    row = overview(4, 8)[-1]
    assert (row.schedule, row.bubble_fraction) == ("picky", None)
    assert overview_lines([row], 4, 8)[1].split() == ["picky", "sync", "-", "-", "-", "-", "-", "Never."]
