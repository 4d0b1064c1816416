from __future__ import annotations

from itertools import pairwise

import pytest

from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.simulate.phases import phase_spans, turning_points
from vpipe.schedule.simulate.simulate import simulate


def test_1f1b_warms_up_by_its_depth() -> None:
    simulation = simulate(build_schedule("1f1b", 4, 8))
    assert phase_spans(simulation.events[0]) == {"warmup": (0, 3), "steady": (3, 24), "cooldown": (25, 33)}
    assert phase_spans(simulation.events[3]) == {"steady": (3, 27)}  # the last rank takes pairs from start to end


def test_gpipe_has_no_pairs() -> None:
    simulation = simulate(build_schedule("gpipe", 2, 3))
    assert phase_spans(simulation.events[1]) == {"warmup": (1, 4), "cooldown": (4, 10)}


def test_updates_at_the_end_belong_to_no_phase() -> None:
    simulation = simulate(build_schedule("pipedream", 1, 2))
    assert phase_spans(simulation.events[0])["steady"] == (0, 6)
    assert phase_spans(()) == {}


def test_turning_points() -> None:
    events = simulate(build_schedule("zb-h1", 4, 8)).events[0]
    first, last = turning_points(events)
    assert (str(events[first].action), str(events[last].action)) == ("0I0", "0F7")
    assert turning_points(()) == (0, -1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_phases_come_in_order_and_cover_all_work(name: str) -> None:
    for events in simulate(build_schedule(name, 4, 8)).events:
        spans = list(phase_spans(events).values())
        assert spans == sorted(spans)
        assert spans[0][0] == events[0].start
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
