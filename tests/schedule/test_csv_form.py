from __future__ import annotations

from typing import Any

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.csv_form import from_csv, to_csv
from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.schedule import WeightRule
from vpipe.schedule.simulate.simulate import simulate

# What torch 2.13 writes (compute only) for ScheduleInterleaved1F1B: 2 ranks, 2 stages each, 2 microbatches.
TORCH = """\
0F0,0F1,2F0,2F1,,,,2B0,,2B1,,0B0,,0B1
,1F0,1F1,,3F0,3B0,3F1,3B1,,1B0,,1B1
"""


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_written_reads_back(name: str) -> None:
    for p, m in [(1, 1), (2, 3), (4, 8)]:
        schedule = build_schedule(name, p, m)
        assert from_csv(to_csv(schedule)) == schedule


@pytest.mark.parametrize("options", [{"vertical_sync": True}, {"microbatches_per_update": 4}])
def test_weight_rules_read_back(options: dict[str, Any]) -> None:
    schedule = build_schedule("pipedream", 4, 8, **options)
    assert from_csv(to_csv(schedule)) == schedule


def test_the_file_is_the_printed_text() -> None:
    assert to_csv(build_schedule("1f1b", 2, 2)) == (
        "# schedule,name=1f1b,placement=loop,update=synchronous,weights=newest\n"
        "0F0,0F1,0B0,0B1,0STEP1\n"
        "1F0,1B0,1F1,1B1,1STEP1\n"
    )


def test_torch_s_compute_only_form_is_read() -> None:
    schedule = from_csv(TORCH, "mine")
    assert (schedule.name, schedule.num_stages, schedule.synchronous) == ("mine", 4, True)
    assert schedule.orders == build_schedule("interleaved", 2, 2).orders
    assert simulate(schedule).makespan > 0


def test_torch_s_pairs_are_taken_apart() -> None:
    text = "0F0,3F0,(0F1;3B0)OVERLAP_F_B,3F1,0B0,3B1,0B1\n1F0,2F0,1F1,2B0,2F1,1B0,2B1,1B1\n"
    schedule = from_csv(text)
    assert schedule.placement.style == "v"
    assert [str(action) for action in schedule.orders[0][2:4]] == ["0F1", "3B0"]


def test_several_updates_make_it_asynchronous() -> None:
    schedule = from_csv("0F0,0B0,0STEP0,0F1,0B1,0STEP1\n")
    assert not schedule.synchronous
    assert schedule.weight_rule is WeightRule.NEWEST


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the CSV has no actions; write one row per rank, e.g. 0F0,0F1"),
        ("# schedule,name=x\n", "the CSV has no actions"),
        ("0F0,0B0\n1F0,what,1B0\n", "rank 1, cell 1: 'what' is not an action"),
        ("0F0,0GATHER,0B0\n", "rank 0, cell 1: '0GATHER' is not an action"),
        ("(0F0;0B0)OVERLAP\n", "rank 0, cell 0: '\\(0F0;0B0\\)OVERLAP' is not an action"),
        (
            "0F0,0B0\n2F0,2B0\n",
            "lays 3 stages over 2 ranks, but not as many on each in a loop .*: rank 0: 0; rank 1: 2",
        ),
        ("0F0,1F0,1B0,0B0\n2F0,3F0,3B0,2B0\n", "rank 0: 0, 1; rank 1: 2, 3"),
        ("# schedule,placement=v\n0F0,2F0,2B0,0B0\n1F0,3F0,3B0,1B0\n", "in placement=v: rank 0: 0, 2"),
        ("# schedule,placement=ring\n0F0,0B0\n", "first row has placement=ring; write one of loop, v"),
        ("# schedule,weights=old\n0F0,0B0\n", "has weights=old; write one of newest, vertical, delayed"),
        ("# schedule,author=me\n0F0,0B0\n", "first row has 'author=me'; it may say name=..., placement=..."),
        ("0F0,0B0,0F2,0B2,0F1,0B1\n", "0B1 comes after 0B2: gradients of a stage accumulate in microbatch order"),
        ("# schedule\n0F0,0F1,0B1,0B0\n", "0B0 comes after 0B1: gradients of a stage accumulate in microbatch"),
    ],
)
def test_files_that_cannot_be_read_say_why(text: str, words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        from_csv(text)
