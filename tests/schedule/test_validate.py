"""Every check has a broken schedule that trips it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.families.warmup import one_f_one_b_order
from vpipe.schedule.placement import Placement
from vpipe.schedule.proof.validate import check_schedule, validate_schedule
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.schedule import Schedule, WeightRule, freeze

Draw = Callable[..., Schedule]
RIGHT = "1F0 1B0 1F1 1B1 1STEP1"


def test_hand_made_schedules_are_legal(draw: Draw) -> None:
    split = draw("0F0 0F1 0I0 0I1 0W0 0W1 0STEP1", "1F0 1I0 1F1 1I1 1W0 1W1 1STEP1")
    recomputed = draw("0F0 0F1 0R0 0B0 0R1 0B1 0STEP1", RIGHT)
    mixed = draw("0F0 0F1 0B0 0I1 0W1 0STEP1", "1F0 1I0 1W0 1F1 1B1 1STEP1")
    v = draw("0F0 3F0 3B0 0B0 0STEP0 3STEP0", "1F0 2F0 2B0 1B0 1STEP0 2STEP0", placement=Placement(2, 2, "v"))
    for schedule in (split, recomputed, mixed, v):
        assert check_schedule(schedule) == []
        validate_schedule(schedule)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["0F0 0F1 0SEND_F1 0B0 0B1 0STEP1", RIGHT], "0SEND_F1 on rank 0 is no computation; list only B F I R STEP W"),
        (["0F0 0F1 7F0 0B0 0B1 0STEP1", RIGHT], "7F0 on rank 0: there is no stage 7, only 0 to 1"),
        (["0F0 0F1 0B0 0B1 0B5 0STEP1", RIGHT], "0B5 on rank 0: there is no microbatch 5, only 0 to 1"),
        ([RIGHT, "0F0 0F1 0B0 0B1 0STEP1"], "0F0 is on rank 1, but stage 0 is on rank 0"),
        (["0F0 0F1 0F0 0B0 0B1 0STEP1", RIGHT], "0F0 is listed twice on rank 0"),
        (["0F0 0F1 0B0 0B1 0B0 0STEP1", RIGHT], "0B0 is listed twice on rank 0"),
        (["0F0 0F1 0B0 0B1 0STEP1", "1F0 1B0 1B1 1STEP1"], r"stage 1 never runs the forward of microbatch 1 \(1F1\)"),
        (["0F0 0F1 0B0 0STEP0", RIGHT], "backward of microbatch 1 once, as B or as I and W; found nothing"),
        (["0F0 0F1 0B0 0I1 0STEP0", RIGHT], "backward of microbatch 1 once, as B or as I and W; found 0I1"),
        (["0F0 0F1 0B0 0B1 0W1 0STEP1", RIGHT], "microbatch 1 once, as B or as I and W; found 0B1, 0W1"),
        (["0F0 0B0 0B1 0F1 0STEP1", RIGHT], "0B1 comes before 0F1 on rank 0, but needs it"),
        (["0F0 0F1 0W0 0I0 0B1 0STEP1", RIGHT], "0W0 comes before 0I0 on rank 0, but needs it"),
        (["0F0 0F1 0B0 0R0 0B1 0STEP1", RIGHT], "0B0 comes before 0R0 on rank 0, but needs it"),
        (["0R0 0F0 0F1 0B0 0B1 0STEP1", RIGHT], "0R0 comes before 0F0 on rank 0, but needs it"),
        (["0F0 0F1 0B1 0B0 0STEP1", RIGHT], "0B0 comes after 0B1: gradients of a stage accumulate in microbatch order"),
        (["0F0 0F1 0I0 0I1 0W1 0W0 0STEP1", RIGHT], "0W0 comes after 0W1: gradients of a stage accumulate"),
        (["0F0 0F1 0B0 0B1", RIGHT], "stage 0 has no update after the backward of microbatches 0, 1; add 0STEP1"),
        (["0F0 0F1 0STEP1 0B0 0B1 0STEP0", RIGHT], "0STEP1 has no gradient to apply"),
        (["0F0 0F1 0B0 0B1 0STEP0", RIGHT], "0STEP0 applies gradients up to microbatch 1; write 0STEP1"),
        (["0F0 0B0 0STEP0 0F1 0B1 0STEP1", RIGHT], "stage 0 has 2 updates; a synchronous schedule has one, at the end"),
        (
            ["0F0 0B0 0F1 0B1 0STEP1", "1F0 1F1 1B0 1B1 1STEP1"],
            "rank 0 waits at 0RECV_B0 for 1SEND_B0 of rank 1; rank 1 waits at 1RECV_F1 for 0SEND_F1 of rank 0",
        ),
        (
            ["0F0 0F1 0B0 0B1 0STEP1", "1F1 1F0 1B0 1B1 1STEP1"],
            "link from rank 0 to rank 1: message 0 is 0SEND_F0 where it is sent but 1RECV_F1 where it is received",
        ),
    ],
)
def test_broken_schedules_are_rejected_with_the_reason(draw: Draw, rows: list[str], words: str) -> None:
    schedule = draw(*rows)
    assert check_schedule(schedule)
    with pytest.raises(ScheduleError, match=words):
        validate_schedule(schedule)


def test_gradients_sent_out_of_order_are_rejected(draw: Draw) -> None:
    # Rank 1 makes its input gradients 1, 0 but rank 0 wants 0, 1; tags would sort it out, NCCL would not.
    schedule = draw("0F0 0F1 0B0 0B1 0STEP1", "1F0 1F1 1I1 1I0 1W0 1W1 1STEP1")
    (reason,) = check_schedule(schedule)
    assert "link from rank 1 to rank 0: message 0 is 1SEND_B1 where it is sent but 0RECV_B0" in reason
    assert "NCCL" in reason


def test_neighbours_on_one_rank_need_each_other_in_order(draw: Draw) -> None:
    placement = Placement(1, 2)
    forward = draw("1F0 0F0 1B0 0B0 1STEP0 0STEP0", placement=placement)
    assert check_schedule(forward) == ["1F0 comes before 0F0 on rank 0, but needs it"]
    backward = draw("0F0 1F0 0B0 1B0 1STEP0 0STEP0", placement=placement)
    assert check_schedule(backward) == ["0B0 comes before 1B0 on rank 0, but needs it"]
    split = draw("0F0 1F0 0I0 1I0 1W0 0W0 1STEP0 0STEP0", placement=placement)
    assert check_schedule(split) == ["0I0 comes before 1I0 on rank 0, but needs it"]


def test_sizes_must_fit() -> None:
    schedule = build_schedule("gpipe", 2, 2)
    assert check_schedule(replace(schedule, orders=schedule.orders[:1])) == ["1 orders for 2 ranks; give one per rank"]
    assert "num_microbatches is 0" in check_schedule(replace(schedule, num_microbatches=0))[0]


def test_a_forward_ahead_of_its_weight_version(draw: Draw) -> None:
    schedule = draw("0F0 0F1 0F2 0B0 0STEP0 0B1 0STEP1 0B2 0STEP2", synchronous=False, weight_rule=WeightRule.DELAYED)
    assert check_schedule(schedule) == [
        "0F2 needs weight version 1, but stage 0 has made only 0 updates by then; "
        "put the forward after update 0 of stage 0"
    ]


def test_version_numbers_that_mean_different_things(draw: Draw) -> None:
    rows = ("0F0 0F1 0B0 0B1 0STEP1", "1F0 1B0 1STEP0 1F1 1B1 1STEP1")
    newest = draw(*rows, synchronous=False)
    assert check_schedule(newest) == []  # each stage for itself
    (reason,) = check_schedule(replace(newest, weight_rule=WeightRule.VERTICAL))
    assert "stage 1 groups its microbatches into other updates than stage 0" in reason


@pytest.mark.parametrize("depths", [(0, 1, 0), (2, 1, 3), (1, 1, 2)])
def test_depths_that_grow_deadlock_as_the_builder_says(depths: tuple[int, ...]) -> None:
    orders = [[*one_f_one_b_order(stage, depth, 6), Action(stage, Kind.STEP, 5)] for stage, depth in enumerate(depths)]
    (reason,) = check_schedule(Schedule("grown", 6, Placement(3), freeze(orders)))
    assert reason.startswith("deadlock: ")
    with pytest.raises(ScheduleError, match="would deadlock"):
        build_schedule("1f1b", 3, 6, depths=depths)


def test_the_message_is_the_grid_with_the_bad_cells_marked(draw: Draw) -> None:
    schedule = draw("0F0 0B0 0F1 0B1 0STEP1", "1F0 1F1 1B0 1B1 1STEP1")
    with pytest.raises(ScheduleError) as caught:
        validate_schedule(schedule)
    head, reason, *grid = str(caught.value).splitlines()
    assert head == "schedule 'drawn' is not legal:"
    assert reason.startswith("- deadlock")
    assert grid == [
        "rank 0  | 0F0     >>0B0<< 0F1     0B1     0STEP1",
        "rank 1  | 1F0     >>1F1<< 1B0     1B1     1STEP1",
    ]


def test_of_a_long_schedule_only_the_bad_part_is_shown() -> None:
    schedule = build_schedule("1f1b", 40, 100)
    orders = [list(order) for order in schedule.orders]
    orders[30][50], orders[30][52] = orders[30][52], orders[30][50]
    with pytest.raises(ScheduleError) as caught:
        validate_schedule(replace(schedule, orders=freeze(orders)))
    grid = [line for line in str(caught.value).splitlines() if line.startswith("rank")]
    assert len(grid) <= 24
    assert max(map(len, grid)) < 200
    marked = [line for line in grid if ">>" in line]
    assert [line.split()[1] for line in marked] == ["30"]
    assert "... " in marked[0]


def test_many_reasons_are_cut_short(draw: Draw) -> None:
    schedule = replace(draw("0F0 0B0 0STEP0"), num_microbatches=20)
    with pytest.raises(ScheduleError, match="- and 28 more"):
        validate_schedule(schedule)
