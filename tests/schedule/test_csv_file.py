"""A CSV file where a schedule is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.csv_file import check_csv_run
from vpipe.schedule.csv_form import to_csv
from vpipe.schedule.registry import build_schedule, find_entry, known_entry
from vpipe.schedule.simulate.simulate import simulate


@pytest.fixture
def zb_v(tmp_path: Path) -> str:
    path = tmp_path / "order.csv"
    path.write_text(to_csv(build_schedule("zb-v", 4, 8)))
    return str(path)


def test_it_is_built_by_its_name(zb_v: str) -> None:
    schedule = build_schedule(zb_v, 4, 8)
    assert schedule == build_schedule(zb_v, 4, 8, stages_per_rank=2) == build_schedule("zb-v", 4, 8)
    assert simulate(schedule).makespan == 25.5


def test_its_entry_tells_the_truth(zb_v: str) -> None:
    entry = find_entry(zb_v)
    assert (entry.synchronous, entry.options, entry.default_stages_per_rank) == (True, (), 2)
    assert entry.summary == "The order in order.csv."


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((4, 6, {}), "has num_microbatches=8, got num_microbatches=6; a file holds one order"),
        ((2, 6, {}), "has num_ranks=4, num_microbatches=8, got num_ranks=2, num_microbatches=6"),
        ((4, 8, {"stages_per_rank": 1}), "has stages_per_rank=2, got stages_per_rank=1"),
        ((4, 8, {"depths": (3, 2, 1, 0)}), "has no option 'depths'; its options: none"),
    ],
)
def test_other_sizes_are_refused(zb_v: str, sizes: tuple[int, int, dict[str, object]], words: str) -> None:
    ranks, microbatches, options = sizes
    with pytest.raises(ScheduleError, match=words):
        build_schedule(zb_v, ranks, microbatches, **options)


def test_files_that_hold_no_schedule(tmp_path: Path) -> None:
    missing, broken, illegal = (str(tmp_path / name) for name in ("missing.csv", "broken.csv", "illegal.CSV"))
    Path(broken).write_bytes(b"\xff\xfe0F0")
    Path(illegal).write_text("0B0,0F0\n")
    for path, words in [
        (missing, "missing.csv' cannot be read .*; give a CSV file, such as `vpipe schedule 1f1b"),
        (broken, "broken.csv' cannot be read"),
        (illegal, "illegal.CSV': schedule 'illegal' is not legal"),
    ]:
        assert known_entry(path) is None
        with pytest.raises(ScheduleError, match=words):
            find_entry(path)


def test_a_run_cannot_follow_a_file_without_a_barrier(zb_v: str) -> None:
    assert check_csv_run(zb_v, synchronous=True) == check_csv_run("pipedream", synchronous=False) == []
    (reason,) = check_csv_run("order.csv", synchronous=False)
    assert "schedule 'order.csv' updates without a barrier" in reason
    assert "use a family (pipedream" in reason
