"""The recorder: what it keeps, and how it numbers iterations."""

from __future__ import annotations

import pickle
import time
from types import SimpleNamespace

import pytest

from vpipe.runtime.trace import TraceEvent, TraceRecorder
from vpipe.schedule.action import Action


def test_a_recorder_keeps_actions_with_their_iteration_and_waiting() -> None:
    done = 5
    recorder = TraceRecorder(1, 4, lambda: done)
    recorder(Action.parse("1RECV_F3"), 100, 130)
    recorder(Action.parse("1F3"), 130, 180)
    recorder(Action.parse("1B9"), 200, 210)
    first, second, third = recorder.events()
    assert (first.rank, first.iteration, first.wait_ns, first.work_ns) == (1, 5, 30, 0)
    assert (second.iteration, second.wait_ns, second.work_ns, second.duration_ns) == (5, 0, 50, 50)
    assert third.iteration == 7
    assert third.start_ns - first.start_ns == 100


def test_an_action_may_say_that_it_waited() -> None:
    recorder = TraceRecorder(0, 4, lambda: 0)
    recorder.waited(20)
    recorder.waited(10)
    recorder(Action.parse("0STEP3"), 0, 40)
    recorder(Action.parse("0F0"), 40, 50)
    assert [(event.wait_ns, event.work_ns) for event in recorder.events()] == [(30, 10), (0, 10)]


def test_times_are_on_the_wall_clock() -> None:
    recorder = TraceRecorder(0, 1, lambda: 0)
    before = time.time_ns()
    now = time.perf_counter_ns()
    after = time.time_ns()
    recorder(Action.parse("0F0"), now, now)
    slack_ns = 1_000_000_000  # the wall clock may be set meanwhile
    assert before - slack_ns <= recorder.events()[0].start_ns <= after + slack_ns


def test_a_pause_between_two_clocks_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    # Wall clock = other clock + 1,000; the process is paused for 500 between them, but in the third reading for 20.
    seen = iter([(0, 1500, 501), (600, 1601, 1101), (1200, 2210, 1220), (1300, 2300, 1800), (1900, 3400, 2401)])
    ticks = (tick for reading in seen for tick in reading)
    clock = SimpleNamespace(perf_counter_ns=lambda: next(ticks), time_ns=lambda: next(ticks))
    monkeypatch.setattr("vpipe.runtime.trace.time", clock)
    recorder = TraceRecorder(0, 1, lambda: 0)
    recorder(Action.parse("0F0"), 5, 7)
    assert (recorder.events()[0].start_ns, recorder.events()[0].end_ns) == (1005, 1007)


def test_a_recorder_forgets_the_oldest_and_can_be_switched_off() -> None:
    recorder = TraceRecorder(0, 4, lambda: 0, max_events=2)
    for microbatch in range(3):
        recorder(Action.parse(f"0F{microbatch}"), 0, 1)
    recorder.enabled = False
    recorder(Action.parse("0F3"), 0, 1)
    assert [event.action.microbatch for event in recorder.events()] == [1, 2]


def test_events_travel_between_processes() -> None:
    event = TraceEvent(0, Action.parse("0F0"), 1, 2, 5, 1)
    assert pickle.loads(pickle.dumps(event)) == event
