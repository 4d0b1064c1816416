from __future__ import annotations

import math
import random
from typing import Any

import pytest

from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.simulate.costs import Costs, Link
from vpipe.schedule.simulate.idle import CAUSES, idle_times
from vpipe.schedule.simulate.simulate import Simulation, simulate


def _simulate(name: str, p: int, m: int, **costs: Any) -> Simulation:
    schedule = build_schedule(name, p, m)
    return simulate(schedule, Costs.from_rank_shares(schedule.placement, **costs))


def _idle(simulation: Simulation, cause: str) -> list[float]:
    return [rank[cause] for rank in idle_times(simulation)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("seed", range(3))
def test_the_causes_add_up_to_the_bubble(name: str, seed: int) -> None:
    draws = random.Random(seed)
    schedule = build_schedule(name, 4, 9)
    times = [tuple(draws.uniform(0.2, 2.0) for _ in range(schedule.num_stages)) for _ in range(4)]
    sizes = tuple(draws.choice((0.0, 2.0 * draws.random())) for _ in range(schedule.num_stages))
    costs = Costs(*times, latency=draws.choice((0.0, 0.4)), bandwidth=2.0, message_bytes=sizes)
    simulation = simulate(schedule, costs)
    for rank, (idle, work) in enumerate(zip(idle_times(simulation), simulation.work, strict=True)):
        assert tuple(idle) == CAUSES
        assert min(idle.values()) >= 0
        assert math.fsum(idle.values()) == pytest.approx(simulation.makespan - work), rank


def test_without_costs_of_links_1f1b_only_fills_and_drains() -> None:
    simulation = _simulate("1f1b", 4, 8)
    # Rank r waits r for its first forward and 2(3 - r) for its first gradient; the gaps of the cooldown are the rest.
    assert _idle(simulation, "warmup") == [6, 5, 4, 3]
    assert _idle(simulation, "cooldown") == [3, 4, 5, 6]
    for cause in ("imbalance", "communication", "step"):
        assert _idle(simulation, cause) == [0, 0, 0, 0]


def test_latency_is_communication_however_many_links_it_came_over() -> None:
    simulation = _simulate("gpipe", 3, 4, latency=0.5)
    # Rank 2 waits for two forwards and two links; rank 0 for two links of the way back, and the work of the others.
    assert _idle(simulation, "communication") == pytest.approx([1.0, 1.0, 1.0])
    assert _idle(simulation, "warmup") == pytest.approx([7.0, 4.5, 2.0])
    assert _idle(simulation, "cooldown") == pytest.approx([0.0, 2.5, 5.0])


def test_waiting_for_a_busy_link_is_communication() -> None:
    simulation = _simulate("naive", 2, 1, bandwidth=1.0, message_bytes=4.0)
    assert _idle(simulation, "communication") == pytest.approx([8.0, 8.0])


def test_a_slow_stage_makes_the_others_wait_for_balance() -> None:
    simulation = _simulate("1f1b", 3, 50, forward=(1, 2, 1), input_grad=(1, 2, 1), weight_grad=(1, 2, 1))
    imbalance = _idle(simulation, "imbalance")
    assert imbalance[0] > 100
    assert imbalance[2] > 100
    assert imbalance[1] < 5


def test_updates_of_others_are_waited_for() -> None:
    assert _idle(_simulate("gpipe", 1, 2, step=3.0), "step") == [0]
    barrier = _simulate("1f1b", 4, 8, step=2.0)
    assert _idle(barrier, "step") == [0, 2, 2, 2]  # while rank 0, last of all, updates
    steady = _simulate("pipedream", 2, 20, step=(0.0, 4.0))
    assert _idle(steady, "step")[0] >= 18  # an update of rank 1 in every round is longer than what rank 0 has to do
    assert _idle(steady, "step")[1] == 0


def test_one_slow_link_is_seen_where_it_hurts() -> None:
    simulation = _simulate("gpipe", 3, 3, links={(1, 2): Link(latency=5.0)})
    # The others are at work for 2 of the 5.
    assert _idle(simulation, "communication") == pytest.approx([3.0, 3.0, 5.0])
