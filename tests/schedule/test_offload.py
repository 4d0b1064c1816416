"""OFFLOAD and FETCH: where they stand, what they cost, and that they keep to their share of the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from vpipe.draw.chrome_trace import to_chrome_trace
from vpipe.draw.grid import legend, text_grid
from vpipe.errors import ScheduleError
from vpipe.schedule.action import MOVES, Action, Kind
from vpipe.schedule.passes.lower import lower
from vpipe.schedule.passes.offload import DEVICE_COPIES, insert_offloads
from vpipe.schedule.passes.recompute_ahead import insert_recomputes
from vpipe.schedule.passes.version_moves import insert_version_moves
from vpipe.schedule.proof.validate import check_schedule, validate_schedule
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.critical_path import critical_path
from vpipe.schedule.simulate.idle import idle_times
from vpipe.schedule.simulate.simulate import Simulation, simulate

FAMILIES = ["gpipe", "1f1b", "interleaved", "looped-bfs", "zb-h1", "zb-h2", "zb-v", "v-half", "pipedream"]


def swapping(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    schedule = build_schedule(name, num_ranks, num_microbatches)
    return insert_offloads(schedule, range(schedule.num_stages))


def text(schedule: Schedule, rank: int = 0) -> str:
    return " ".join(map(str, schedule.orders[rank]))


def test_out_after_the_forward_and_back_one_computation_before_the_backward() -> None:
    assert text(swapping("gpipe", 1, 4)) == (
        "0F0 0OFFLOAD0 0F1 0OFFLOAD1 0F2 0OFFLOAD2 0FETCH0 0F3 0OFFLOAD3 0FETCH1 0B0 0FETCH2 0B1 0FETCH3 0B2 0B3 0STEP3"
    )


def test_sends_go_before_what_is_moved() -> None:
    first = lower(swapping("1f1b", 3, 4))[0]
    assert " ".join(map(str, first[:6])) == "0F0 0SEND_F0 0OFFLOAD0 0F1 0SEND_F1 0OFFLOAD1"


def test_stages_that_hold_little_are_left_alone() -> None:
    schedule = swapping("1f1b", 4, 8)
    moved = {action.stage for order in schedule.orders for action in order if action.kind in MOVES}
    assert moved == {0, 1}
    plain = build_schedule("1f1b", 2, 8)
    assert insert_offloads(plain, [0, 1]) is plain
    with pytest.raises(ScheduleError, match="there is no stage 2 to swap, only 0 to 1"):
        insert_offloads(plain, [2])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 4), (2, 6), (4, 8), (5, 12)])
def test_every_family_stays_legal(name: str, num_ranks: int, num_microbatches: int) -> None:
    validate_schedule(swapping(name, num_ranks, num_microbatches))


def on_device(schedule: Schedule, simulation: Simulation, stage: int) -> int:
    """Count the microbatches of a stage that are on the device at once, at most: moves free memory when they end."""
    changes: list[tuple[float, int]] = []
    rank = schedule.position_of(stage)
    away = set()
    for action, start, end in simulation.moves[rank]:
        if action.stage == stage:
            away.add(action.microbatch)
            changes.append((end, -1) if action.kind is Kind.OFFLOAD else (start, +1))
    for action, start, end in simulation.events[rank]:
        if action.stage == stage and action.kind is Kind.F:
            changes.append((start, +1))
        elif action.stage == stage and action.kind in (Kind.B, Kind.I):
            changes.append((end, -1))
    held = most = 0
    for _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zb-h2", "pipedream"])
@pytest.mark.parametrize("move", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 5), (4, 8), (5, 12)])
def test_no_more_microbatches_are_on_the_device_than_said(
    name: str, move: float, num_ranks: int, num_microbatches: int
) -> None:
    schedule = swapping(name, num_ranks, num_microbatches)
    costs = Costs.from_rank_shares(schedule.placement, move=move, latency=0.1)
    simulation = simulate(schedule, costs)
    for stage in range(schedule.num_stages):
        assert on_device(schedule, simulation, stage) <= DEVICE_COPIES


def test_moves_that_fit_beside_the_computation_cost_nothing() -> None:
    schedule = swapping("gpipe", 1, 6)
    for move in (0.0, 0.5):
        costs = Costs.from_rank_shares(schedule.placement, move=move)
        assert simulate(schedule, costs).makespan == 6 * 3
    slow = simulate(schedule, Costs.from_rank_shares(schedule.placement, move=2.0))
    assert slow.makespan > 6 * 3
    assert len(slow.moves[0]) == 12
    assert all(first.end <= second.start for first, second in pairwise(slow.moves[0]))


def test_what_is_computed_beside_a_move_takes_its_share_longer() -> None:
    schedule = swapping("gpipe", 1, 6)
    for share in (0.5, 1.0, 1.5):
        costs = Costs.from_rank_shares(schedule.placement, move=0.5, move_share=share)
        simulation = simulate(schedule, costs)
        assert simulation.makespan == pytest.approx(6 * 3 + share * 12 * 0.5)
        assert simulation.work == pytest.approx((simulation.makespan,))


def test_what_is_moved_while_the_rank_waits_takes_nothing_from_it() -> None:
    schedule = swapping("1f1b", 4, 8)
    free = Costs.from_rank_shares(schedule.placement, move=0.5)
    charged = simulate(schedule, replace(free, move_share=1.0))
    ends = {event.action: event.end - event.start for event in charged.events[0]}
    # The fourth microbatch leaves while rank 0 waits for its first gradient; the last one comes back in a wait, too.
    assert ends[Action(0, Kind.F, 0)] == 1.0
    assert ends[Action(0, Kind.F, 1)] == 1.5
    assert ends[Action(0, Kind.B, 0)] == 2.0
    assert ends[Action(0, Kind.B, 6)] == 2.0
    assert simulate(schedule, free).makespan < charged.makespan < simulate(schedule, free).makespan + 14 * 0.5


def test_weight_versions_are_charged_the_same_way() -> None:
    schedule = insert_version_moves(build_schedule("pipedream", 4, 12), [0])
    free = Costs.from_rank_shares(schedule.placement, move_versions=0.25)
    moves = sum(action.kind in MOVES for action in schedule.orders[0])
    more = simulate(schedule, replace(free, move_share=1.0)).work[0] - simulate(schedule, free).work[0]
    assert 0 < more <= moves * 0.25 + 1e-9


def test_a_backward_waits_for_what_is_fetched() -> None:
    schedule = swapping("gpipe", 1, 3)
    simulation = simulate(schedule, Costs.from_rank_shares(schedule.placement, move=5.0))
    ends = {event.action: event.end for event in simulation.moves[0]}
    starts = {event.action: event.start for event in simulation.events[0]}
    assert starts[Action(0, Kind.B, 0)] == ends[Action(0, Kind.FETCH, 0)]
    # Out of the device one at a time: the second OFFLOAD waits for the first, and the rank with it.
    assert starts[Action(0, Kind.F, 2)] == ends[Action(0, Kind.OFFLOAD, 0)]


def test_a_recomputation_ahead_belongs_to_its_backward() -> None:
    schedule = insert_recomputes(build_schedule("gpipe", 1, 4), [0])
    both = insert_offloads(schedule, [0])
    validate_schedule(both)
    assert "0R0 0FETCH1 0B0 0R1 0FETCH2 0B1 0R2" in text(both)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("0F0 0OFFLOAD0 0B0 0STEP0", "0OFFLOAD0 is there and 0FETCH0 is not"),
        ("0F0 0FETCH0 0B0 0STEP0", "0FETCH0 is there and 0OFFLOAD0 is not"),
        ("0OFFLOAD0 0F0 0FETCH0 0B0 0STEP0", "0OFFLOAD0 comes before 0F0"),
        ("0F0 0FETCH0 0OFFLOAD0 0B0 0STEP0", "0FETCH0 comes before 0OFFLOAD0"),
        ("0F0 0OFFLOAD0 0B0 0FETCH0 0STEP0", "0B0 comes before 0FETCH0"),
        ("0F0 0SEND_F0 0B0 0STEP0", "0SEND_F0 on rank 0 is no computation"),
    ],
)
def test_moves_in_the_wrong_place_are_told(draw: Callable[..., Schedule], row: str, reason: str) -> None:
    assert any(reason in found for found in check_schedule(draw(row)))


def slow(name: str = "gpipe", num_ranks: int = 2, num_microbatches: int = 4, move: float = 2.5) -> Simulation:
    schedule = swapping(name, num_ranks, num_microbatches)
    return simulate(schedule, Costs.from_rank_shares(schedule.placement, move=move, latency=0.25))


def test_the_host_link_is_drawn_under_its_rank() -> None:
    schedule = swapping("gpipe", 1, 3)
    grid = text_grid(simulate(schedule, Costs.from_rank_shares(schedule.placement, move=1.0)))
    assert grid.text() == (
        "time   0              5\nrank 0 F0 F1 F2    B0--- B1--- B2---*\n  host    >0 >1 <0 >2 <1 <2"
    )
    assert "> out to host memory  < back" in legend(schedule)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "pipedream"])
def test_waits_for_the_host_link_are_told_apart(name: str) -> None:
    simulation = slow(name, 4, 8)
    idle = idle_times(simulation)
    total = sum(sum(rank.values()) for rank in idle)
    assert total == pytest.approx(simulation.bubble_fraction * 4 * simulation.makespan)
    quick = simulate(simulation.schedule, Costs.from_rank_shares(simulation.schedule.placement, latency=0.25))
    assert sum(rank["host"] for rank in idle) > 0.2 * total
    assert sum(rank["host"] for rank in idle_times(quick)) == 0


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "pipedream"])
def test_the_critical_path_goes_through_the_host_link(name: str) -> None:
    simulation = slow(name, 4, 8)
    path = critical_path(simulation)
    assert path[0].start == 0
    assert path[-1].end == simulation.makespan
    assert all(first.end == pytest.approx(second.start) for first, second in pairwise(path))
    assert any(event.action.kind in MOVES for event in path)


def test_the_trace_has_a_row_for_the_host_link() -> None:
    simulation = slow()
    rows = to_chrome_trace([simulation])["traceEvents"]
    names = [row["args"]["name"] for row in rows if row["name"] == "thread_name"]
    assert names == ["rank 0", "host memory of rank 0", "rank 1", "host memory of rank 1"]
    moved = [row["args"]["action"] for row in rows if row.get("cat", "").endswith("host memory") and row["tid"] == 2]
    assert moved == [str(event.action) for event in simulation.moves[0]]
