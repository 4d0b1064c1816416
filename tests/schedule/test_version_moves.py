"""OFFLOAD_V and FETCH_V: where they stand, what they cost, and how many weight versions they leave on the device."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpipe.draw.chrome_trace import to_chrome_trace
from vpipe.draw.grid import legend, summary_lines, text_grid, to_dict
from vpipe.errors import ScheduleError
from vpipe.schedule.action import VERSION_MOVES, Action, Kind
from vpipe.schedule.csv_form import from_csv, to_csv
from vpipe.schedule.passes.lower import lower
from vpipe.schedule.passes.offload import insert_offloads
from vpipe.schedule.passes.recompute_ahead import insert_recomputes
from vpipe.schedule.passes.version_moves import DEVICE_VERSIONS, insert_version_moves
from vpipe.schedule.proof.validate import check_schedule, validate_schedule
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.critical_path import critical_path
from vpipe.schedule.simulate.idle import idle_times
from vpipe.schedule.simulate.simulate import Simulation, simulate
from vpipe.schedule.simulate.usage import weight_versions_over_time
from vpipe.schedule.weights import weight_usage


def moving(num_ranks: int, num_microbatches: int, **options: object) -> Schedule:
    schedule = build_schedule("pipedream", num_ranks, num_microbatches, **options)
    return insert_version_moves(schedule, range(num_ranks))


def on_device(schedule: Schedule) -> list[int]:
    return [stage.num_on_device for stage in weight_usage(schedule)]


def replay_on_device(schedule: Schedule, stage: int) -> int:
    """Count the versions that have a place on the device, by what each action does to them."""
    version_of = weight_usage(schedule)[stage].version_of
    uses = [version_of[action.microbatch] for action in schedule.stage_order(stage) if action.kind in (Kind.F, Kind.B)]
    held, copied, newest, most = {0}, set(), 0, 1
    for action in schedule.stage_order(stage):
        version = version_of[action.microbatch]
        if action.kind in (Kind.F, Kind.B):
            assert version in held
            uses.remove(version)
        elif action.kind is Kind.OFFLOAD_V:
            assert version == newest
            copied.add(version)
        elif action.kind is Kind.FETCH_V:
            assert version in copied - held
            held.add(version)
        else:
            held = {each for each in held if each in uses} - ({newest} & copied) | {newest + 1}
            newest += 1
        most = max(most, len(held))
    return most


def test_out_while_it_is_used_and_back_when_its_place_is_free() -> None:
    assert " ".join(map(str, moving(3, 6).orders[0])) == (
        "0F0 0F1 0F2 0B0 0STEP0 0F3 0OFFLOAD_V3 0B1 0STEP1 0F4 0OFFLOAD_V4 0B2 0STEP2 0FETCH_V3 0F5 0OFFLOAD_V5 0B3 "
        "0STEP3 0FETCH_V4 0B4 0STEP4 0FETCH_V5 0B5 0STEP5"
    )


def test_stages_that_keep_two_versions_are_left_alone() -> None:
    moved = {action.stage for order in moving(4, 8).orders for action in order if action.kind in VERSION_MOVES}
    assert moved == {0, 1}
    for plain in (
        build_schedule("pipedream", 2, 8),
        build_schedule("pipedream-2bw", 4, 12),
        build_schedule("1f1b", 4, 8),
    ):
        assert insert_version_moves(plain, range(plain.num_stages)) is plain
    twice = insert_version_moves(moving(4, 8), range(4))
    assert twice.orders == moving(4, 8).orders
    with pytest.raises(ScheduleError, match="there is no stage 2 whose weight versions could be moved, only 0 to 1"):
        insert_version_moves(build_schedule("pipedream", 2, 8), [2])


@given(st.integers(1, 9), st.integers(1, 24), st.integers(0, 3), st.data())
def test_two_versions_are_on_the_device(
    num_ranks: int, num_microbatches: int, deeper: int, data: st.DataObject
) -> None:
    depths = [min(num_ranks - 1 - stage + deeper, num_microbatches) for stage in range(num_ranks)]
    plain = build_schedule("pipedream", num_ranks, num_microbatches, depths=depths)
    stages = data.draw(st.sets(st.integers(0, num_ranks - 1)))
    schedule = insert_version_moves(plain, stages)
    validate_schedule(schedule)
    for stage, (before, after) in enumerate(zip(weight_usage(plain), weight_usage(schedule), strict=True)):
        assert (after.version_of, after.num_versions) == (before.version_of, before.num_versions)
        assert after.num_on_device == replay_on_device(schedule, stage)
        assert after.num_on_device == (
            min(DEVICE_VERSIONS, before.num_versions) if stage in stages else before.num_versions
        )
    assert Schedule.__eq__(from_csv(to_csv(schedule)), schedule)


@given(st.integers(1, 8), st.integers(1, 20))
def test_with_vertical_sync_what_is_moved_is_fewer_on_the_device(num_ranks: int, num_microbatches: int) -> None:
    plain = build_schedule("pipedream", num_ranks, num_microbatches, vertical_sync=True)
    schedule = insert_version_moves(plain, range(num_ranks))
    validate_schedule(schedule)
    for stage in range(num_ranks):
        count = weight_usage(schedule)[stage].num_on_device
        assert count == replay_on_device(schedule, stage)
        moved = any(action.kind is Kind.OFFLOAD_V for action in schedule.stage_order(stage))
        assert (count < weight_usage(plain)[stage].num_versions) == moved
    if num_microbatches >= 16 and num_ranks == 8:
        assert on_device(schedule) == [2, 8, 8, 7, 6, 5, 4, 3]


@pytest.mark.parametrize("num_microbatches", [5, 12])
def test_with_activations_and_recomputations_it_stays_legal(num_microbatches: int) -> None:
    plain = insert_recomputes(build_schedule("pipedream", 5, num_microbatches), [0, 2])
    both = insert_version_moves(insert_offloads(plain, range(5)), range(5))
    validate_schedule(both)
    other = insert_offloads(insert_version_moves(plain, range(5)), range(5))
    validate_schedule(other)
    assert on_device(both) == on_device(other) == [2, 2, 2, 2, 1]


def test_sends_go_before_what_is_moved() -> None:
    first = " ".join(map(str, lower(moving(3, 6))[0]))
    assert "0F3 0SEND_F3 0OFFLOAD_V3 0RECV_B1 0B1" in first


def timed(move: float, num_ranks: int = 4, num_microbatches: int = 12) -> Simulation:
    schedule = moving(num_ranks, num_microbatches)
    return simulate(schedule, Costs.from_rank_shares(schedule.placement, move_versions=move, latency=0.25))


def test_moves_that_fit_beside_the_computation_cost_nothing_until_the_pipeline_drains() -> None:
    assert timed(0.5).makespan == timed(0.0).makespan
    # On one rank nothing but the backwards comes after the last forward, each of which waits for its weights.
    alone = insert_version_moves(build_schedule("pipedream", 1, 12, depths=[3]), [0])
    ends = [
        simulate(alone, Costs.from_rank_shares(alone.placement, move_versions=move)).makespan
        for move in (0.0, 0.5, 1.0)
    ]
    assert ends == [36, 36 + 3 * 0.5, 36 + 3 * 1.0]
    slow = timed(3.0)
    assert slow.makespan > timed(0.0).makespan + 12
    assert all(first.end <= second.start for first, second in pairwise(slow.moves[0]))


def test_an_update_waits_for_the_way_out_and_a_backward_for_the_way_back() -> None:
    simulation = timed(5.0)
    ends = {event.action: event.end for event in simulation.moves[0]}
    starts = {event.action: event.start for event in simulation.events[0]}
    assert starts[Action(0, Kind.STEP, 1)] == ends[Action(0, Kind.OFFLOAD_V, 4)]
    waits = [starts[Action(0, Kind.B, index)] - ends[Action(0, Kind.FETCH_V, index)] for index in range(4, 12)]
    assert min(waits) == 0


def test_what_is_held_over_time_is_what_is_on_the_device() -> None:
    for rank, curve in enumerate(weight_versions_over_time(timed(0.5))):
        assert max(value for _, value in curve) == [2, 2, 2, 1][rank]
        assert curve[-1][1] == 1


@pytest.mark.parametrize("move", [0.5, 2.0, 4.0])
def test_waits_for_the_host_link_are_explained(move: float) -> None:
    simulation = timed(move)
    idle = idle_times(simulation)
    total = sum(sum(rank.values()) for rank in idle)
    assert total == pytest.approx(simulation.bubble_fraction * 4 * simulation.makespan)
    path = critical_path(simulation)
    assert (path[0].start, path[-1].end) == (0, simulation.makespan)
    assert all(first.end == pytest.approx(second.start) for first, second in pairwise(path))
    assert any(event.action.kind in VERSION_MOVES for event in path)


ROW = "0F0 0F1 0F2 0B0 0STEP0 0F3 0OFFLOAD_V3 0B1 0STEP1 0B2 0STEP2 0FETCH_V3 0B3 0STEP3"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (" 0FETCH_V3", "", "0OFFLOAD_V3 is there and 0FETCH_V3 is not; moving to host memory and back go together"),
        (" 0OFFLOAD_V3", "", "0FETCH_V3 is there and 0OFFLOAD_V3 is not"),
        (
            "0F3 0OFFLOAD_V3 0B1 0STEP1",
            "0F3 0B1 0STEP1 0OFFLOAD_V3",
            "0OFFLOAD_V3 moves weight version 1 of stage 0, but the newest there is version 2; put it between the "
            "updates that make and replace version 1",
        ),
        (
            "0FETCH_V3 0B3",
            "0B3 0FETCH_V3",
            "0B3 uses weight version 1 of stage 0, which is in host memory until 0FETCH_V3; put that before it",
        ),
        (
            "0B1 0STEP1 0B2 0STEP2 0FETCH_V3",
            "0FETCH_V3 0B1 0STEP1 0B2 0STEP2",
            "0FETCH_V3 brings back weight version 1 of stage 0, which no update has replaced",
        ),
        ("0OFFLOAD_V3 0B1 0STEP1 0B2 0STEP2 0FETCH_V3", "0FETCH_V3 0OFFLOAD_V3 0B1 0STEP1 0B2 0STEP2", "comes before"),
    ],
)
def test_moves_in_the_wrong_place_are_told(draw: Callable[..., Schedule], old: str, new: str, reason: str) -> None:
    validate_schedule(draw(ROW, synchronous=False))
    assert old in ROW
    assert any(reason in found for found in check_schedule(draw(ROW.replace(old, new), synchronous=False)))


def test_a_version_moves_once(draw: Callable[..., Schedule]) -> None:
    row = "0F0 0F1 0B0 0STEP0 0F2 0F3 0OFFLOAD_V2 0OFFLOAD_V3 0B1 0STEP1 0FETCH_V2 0FETCH_V3 0B2 0STEP2 0B3 0STEP3"
    reasons = check_schedule(draw(row, synchronous=False))
    assert reasons == ["0OFFLOAD_V3 moves weight version 1 of stage 0, which moves already"]


def test_the_host_link_is_drawn_under_its_rank() -> None:
    schedule = moving(3, 5)
    simulation = simulate(schedule, Costs.from_rank_shares(schedule.placement, move_versions=1.0))
    drawn = text_grid(simulation).text().splitlines()
    assert drawn[1:3] == [
        "rank 0 F0 F1 F2             B0---*F3 B1---*F4 B2---*   B3---*   B4---*",
        "  host                               }3       }4    {3       {4",
    ]
    assert "} weight version out to host memory  { back" in legend(schedule)
    assert "weight versions   3 2 1 parameter sets kept on ranks 0 to 2, 2 2 1 on the device" in summary_lines(
        simulation, ""
    )
    described = to_dict(simulation)
    assert (described["weight_versions"], described["weight_versions_on_device"]) == ([3, 2, 1], [2, 2, 1])
    rows = to_chrome_trace([simulation])["traceEvents"]
    moved = [row["name"] for row in rows if row.get("cat", "").startswith("weights ")]
    assert moved == ["OFFLOAD_V3", "OFFLOAD_V4", "FETCH_V3", "FETCH_V4"]
