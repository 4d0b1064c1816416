"""Costs come back out of traces in which they are known."""

from __future__ import annotations

import math

import pytest
from trace_toys import Executor

from vpipe.report.measured_costs import measure_costs
from vpipe.runtime.trace import TraceEvent
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.registry import build_schedule

WORK = {(stage, kind): 2.0 + stage + index / 8 for stage in range(4) for index, kind in enumerate(Kind)}
FULL = Executor(WORK, gap=0.01, send=0.2, receive=0.3, latency=0.5, turn=0.7)


def trace(name, executor, num_ranks=4, size=8, batches=4):
    schedule = build_schedule(name, num_ranks, size * (batches if name == "pipedream" else 1))
    return executor.run(schedule, batches, size)


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "zb-h1", "pipedream"])
def test_each_cost_is_found_again(name):
    found = measure_costs(trace(name, FULL))
    for (stage, kind), time in found.work_ms.items():
        assert time == pytest.approx(WORK[stage, kind], abs=1e-4)
    extra = found.overheads
    assert extra.gap_ms == pytest.approx(0.01, abs=1e-4)
    assert extra.send_ms == pytest.approx(0.2, abs=1e-4)
    assert extra.receive_ms == pytest.approx(0.3, abs=1e-4)
    assert extra.turn_ms == pytest.approx(0.7, abs=1e-4)
    assert extra.tell_ms is None
    assert extra.meet_ms is None
    assert sorted(found.links) == [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)]
    for link in found.links.values():
        assert link.latency == pytest.approx(0.5, abs=1e-4)
        assert link.bandwidth == math.inf


def test_kinds_that_did_not_run_have_no_time():
    assert {kind for _, kind in measure_costs(trace("1f1b", FULL)).work_ms} == {Kind.F, Kind.B, Kind.STEP}
    assert {kind for _, kind in measure_costs(trace("zb-h1", FULL)).work_ms} == {Kind.F, Kind.I, Kind.W, Kind.STEP}


def test_a_link_that_is_full_shows_its_bandwidth():
    executor = Executor({(s, k): 2.0 for s in range(2) for k in (Kind.F, Kind.B)}, latency=1.0, occupied=5.0)
    sizes = {Action(0, Kind.SEND_F, 0): 1000.0, Action(1, Kind.SEND_B, 0): 1000.0}
    for link in measure_costs(trace("gpipe", executor, 2), sizes).links.values():
        assert link.latency == pytest.approx(1.0, abs=0.2)
        assert 1000 / link.bandwidth == pytest.approx(5.0, abs=0.06)


def test_waiting_for_the_loss_and_for_the_norm_is_seen():
    # The last stage's weight gradients make its rank the last to end a batch.
    work = {(1, Kind.W): 3.0}
    assert measure_costs(trace("zb-h1", Executor(work, turn=0.5, tell=2.0), 2)).overheads.tell_ms == pytest.approx(2.0)
    found = measure_costs(trace("1f1b", Executor(turn=0.5, meet=0.25), 3))
    assert found.overheads.meet_ms == pytest.approx(0.25)
    assert found.work_ms[0, Kind.STEP] == pytest.approx(1.0)


def test_an_action_that_a_timeline_split_into_waiting_and_work_is_one():
    step = Action(0, Kind.STEP, 0)
    events = [
        TraceEvent(0, Action(0, Kind.F, 0), 0, 0, 2_000_000),
        TraceEvent(0, Action(0, Kind.B, 0), 0, 2_000_000, 5_000_000),
        TraceEvent(0, step, 0, 5_000_000, 9_000_000, 4_000_000),
        TraceEvent(0, step, 0, 9_000_000, 10_000_000),
    ]
    found = measure_costs(events)
    assert found.work_ms == {(0, Kind.F): 2.0, (0, Kind.B): 3.0, (0, Kind.STEP): 1.0}
    assert found.overheads.meet_ms == 4.0


def test_nothing_costs_nothing():
    found = measure_costs([])
    assert (found.work_ms, found.links, found.overheads.turn_ms) == ({}, {}, 0.0)
