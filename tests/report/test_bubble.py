"""Measured bubbles: equal to the simulator's on a trace that was simulated, and closed forms by hand."""

from __future__ import annotations

import pytest

from vpipe.report.bubble import between_iterations, clip_events, measure_pipeline
from vpipe.runtime.trace import TraceEvent
from vpipe.schedule.action import Action
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import simulate

MS = 1_000_000


def _event(rank: int, action: str, start: int, end: int, wait: int = 0, iteration: int = 0) -> TraceEvent:
    return TraceEvent(rank, Action.parse(action), iteration, start * MS, end * MS, wait * MS)


def _simulated(name: str, num_ranks: int, num_microbatches: int) -> tuple[list[TraceEvent], float, float]:
    schedule = build_schedule(name, num_ranks, num_microbatches)
    simulation = simulate(schedule, Costs.from_rank_shares(schedule.placement, forward=1, input_grad=1, weight_grad=1))
    events = [
        TraceEvent(rank, action, 0, round(start * MS), round(end * MS))
        for rank, row in enumerate(simulation.events)
        for action, start, end in row
    ]
    return events, simulation.bubble_fraction, simulation.span_bubble_fraction


@pytest.mark.parametrize(("name", "num_ranks"), [("gpipe", 4), ("1f1b", 4), ("naive", 2), ("pipedream", 3)])
def test_a_simulated_trace_gives_the_simulators_bubbles(name: str, num_ranks: int) -> None:
    events, bubble, span = _simulated(name, num_ranks, 8)
    times = measure_pipeline(events)
    assert times.bubble_fraction == pytest.approx(bubble, abs=1e-12)
    assert times.span_bubble_fraction == pytest.approx(span, abs=1e-12)


def test_1f1b_on_4_ranks_with_8_microbatches() -> None:
    times = measure_pipeline(_simulated("1f1b", 4, 8)[0])
    assert times.makespan_ms == pytest.approx(33)
    assert times.bubble_fraction == pytest.approx(3 / 11)
    assert [(stage.forward_ms, stage.backward_ms) for stage in times.stages] == [(1.0, 2.0)] * 4


def test_waiting_is_no_work_and_is_what_communication_share_counts() -> None:
    times = measure_pipeline(
        [
            _event(0, "0F0", 0, 2),
            _event(0, "0RECV_B0", 2, 6, wait=4),
            _event(0, "0B0", 6, 10),
            _event(1, "1F0", 1, 4, wait=1),
            _event(1, "1SEND_B0", 4, 5),
        ]
    )
    assert [(rank.busy_ms, rank.waiting_ms, rank.span_ms) for rank in times.ranks] == [(6, 4, 10), (2, 1, 4)]
    assert times.bubble_fraction == pytest.approx(12 / 20)
    assert times.span_bubble_fraction == pytest.approx(6 / 20)
    assert times.communication_share == pytest.approx(5 / 20)
    assert times.stages[1].forward_ms == 2


def test_split_backwards_and_recomputation_count_as_one_backward() -> None:
    events = [_event(0, "0R0", 0, 1), _event(0, "0I0", 1, 3), _event(0, "0W0", 3, 6), _event(0, "0STEP0", 6, 10)]
    (stage,) = measure_pipeline(events).stages
    assert (stage.forward_ms, stage.backward_ms, stage.update_ms) == (0, 6, 4)


def test_an_empty_trace_measures_nothing() -> None:
    times = measure_pipeline([])
    assert (times.makespan_ms, times.bubble_fraction, times.communication_share) == (0, 0, 0)


def test_clipping_keeps_the_part_inside() -> None:
    events = [_event(0, "0F0", 0, 4, wait=2), _event(0, "0F1", 4, 8, wait=2), _event(0, "0F2", 8, 9)]
    assert clip_events(events, 1 * MS, 5 * MS) == [
        _event(0, "0F0", 1, 4, wait=1),
        _event(0, "0F1", 4, 5, wait=1),
    ]


# An asynchronous run of 2 ranks: rank 1 works one action behind, so iterations overlap in time.
OVERLAPPING = [
    event
    for iteration, start in enumerate([0, 50, 52, 54, 56])
    for event in (
        _event(0, f"0F{iteration}", start, start + 2 if iteration else 50, iteration=iteration),
        _event(
            1, f"1F{iteration}", start + 2 if iteration else 50, start + 4 if iteration else 52, iteration=iteration
        ),
    )
]


def test_iterations_are_measured_from_the_start_of_one_to_the_start_of_another_on_all_ranks() -> None:
    times = measure_pipeline(between_iterations(OVERLAPPING, 1, 4))
    assert times.makespan_ms == 6
    assert [rank.busy_ms for rank in times.ranks] == [6, 6]
    assert times.bubble_fraction == 0


def test_without_a_next_iteration_everything_to_the_end_is_measured() -> None:
    assert measure_pipeline(between_iterations(OVERLAPPING, 1, 5)).makespan_ms == 10
    assert between_iterations(OVERLAPPING, 0, 5) == OVERLAPPING
    assert between_iterations([], 0, 1) == []


def test_waiting_for_an_iteration_belongs_to_the_one_before() -> None:
    waiting = _event(1, "1RECV_F1", 40, 52, wait=12, iteration=1)
    (event,) = [item for item in between_iterations([*OVERLAPPING, waiting], 1, 4) if item.wait_ns]
    assert (event.start_ns, event.wait_ns) == (50 * MS, 2 * MS)
