from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from vpipe.schedule.action import Kind
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.critical_path import critical_path
from vpipe.schedule.simulate.simulate import simulate


def _texts(name: str, p: int, m: int, **costs: float) -> str:
    schedule = build_schedule(name, p, m)
    path = critical_path(simulate(schedule, Costs.from_rank_shares(schedule.placement, **costs)))
    return " ".join(str(event.action) for event in path)


def test_one_microbatch_goes_there_and_back() -> None:
    assert _texts("gpipe", 3, 1) == "0F0 1F0 2F0 2B0 1B0 0B0 0STEP0"


def test_the_path_goes_through_the_slow_stage() -> None:
    schedule = build_schedule("gpipe", 3, 3)
    costs = Costs.from_rank_shares(schedule.placement, forward=(1, 2, 1), input_grad=(1, 2, 1))
    path = critical_path(simulate(schedule, costs))
    assert " ".join(str(event.action) for event in path) == "0F0 1F0 1F1 1F2 2F2 2B0 1B0 1B1 1B2 0B2 0STEP2"


def test_transfers_that_take_time_are_on_the_path() -> None:
    assert _texts("gpipe", 2, 1, latency=0.5) == "0F0 0SEND_F0 1F0 1B0 1SEND_B0 0B0 0STEP0"


def test_a_busy_link_is_on_the_path() -> None:
    path = _texts("gpipe", 2, 3, latency=0.5, bandwidth=1.0, message_bytes=5.0)
    assert path == "0F0 0SEND_F0 0SEND_F1 0SEND_F2 1F2 1B0 1SEND_B0 1SEND_B1 1SEND_B2 0B2 0STEP2"


@pytest.mark.parametrize("seed", range(20))
def test_the_path_has_no_gap_from_start_to_end(seed: int) -> None:
    draws = random.Random(seed)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("naive", {"stages_per_rank": 2}),
        ("gpipe", {}),
        ("1f1b", {}),
        ("pipedream", {"depths": (5, 4, 1, 0)}),
        ("interleaved", {"stages_per_rank": 3}),
        ("zb-v", {}),
    ]
    for name, options in cases:
        schedule = build_schedule(name, 4, 7, **options)
        times = [tuple(draws.choice((0.0, 1.0, draws.random())) for _ in range(schedule.num_stages)) for _ in range(4)]
        sizes = tuple(draws.choice((0.0, 4.0 * draws.random())) for _ in range(schedule.num_stages))
        latency = draws.choice((0.0, draws.random()))
        costs = Costs(*times, latency=latency, bandwidth=draws.choice((1.0, 3.0)), message_bytes=sizes)
        simulation = simulate(schedule, costs)
        path = critical_path(simulation)
        assert path[0].start == 0
        assert path[-1].end == simulation.makespan
        assert all(before.end == after.start for before, after in pairwise(path))
        assert sum(event.end - event.start for event in path) == pytest.approx(simulation.makespan)
        assert {event.action.kind for event in path} <= {
            Kind.F,
            Kind.B,
            Kind.I,
            Kind.W,
            Kind.STEP,
            Kind.SEND_F,
            Kind.SEND_B,
        }
