"""Lower bounds: their closed forms, and that nothing that can be built is below them."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.placement import Placement
from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.search.bounds import lower_bound
from vpipe.schedule.search.problem import SearchProblem, capacities
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import simulate


def _bound(placement: Placement, num_microbatches: int, limit: float, **times: Any) -> float:
    room = capacities([limit] * placement.num_ranks, placement.stages_per_rank)
    costs = Costs.from_rank_shares(placement, **times)
    return lower_bound(SearchProblem(placement, num_microbatches, costs, room))


@pytest.mark.parametrize(("p", "m"), [(1, 3), (2, 4), (4, 8), (8, 16)])
def test_one_microbatch_of_memory_means_one_way_there_and_back_after_the_other(p: int, m: int) -> None:
    # Weight gradients of the other ranks run beside the way back; the first rank's own ends a microbatch.
    assert _bound(Placement(p), m, 1) == m * (2 * p + 1)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (8, 16)])
def test_with_enough_memory_the_last_rank_s_work_is_the_bound(p: int, m: int) -> None:
    assert _bound(Placement(p), m, 2 * p - 1) == p - 1 + 3 * m  # what ZB-H2 reaches
    assert _bound(Placement(p, 2, "v"), m, p) == (p - 1) / 2 + 3 * m  # what ZB-V reaches


def test_the_bottleneck_the_steps_and_the_links_count() -> None:
    placement = Placement(3)
    assert _bound(placement, 8, 5, forward=(1, 4, 1)) == 1 + 8 * 6
    assert _bound(placement, 8, 5, step=2) == 2 + 8 * 3 + 2
    assert _bound(placement, 8, 5, latency=0.5) == 2 + 1 + 8 * 3
    assert _bound(placement, 8, 5, dispatch=0.25) == 2 * 1.25 + 8 * 3.5 + 0.25  # F, a full backward; the update


def test_places_that_are_needed_for_long_bind() -> None:
    # Rank 0 of four: F, two thirds of a line forward and back, I and W; three at a time.
    assert _bound(Placement(4), 9, 3) >= 3 * (1 + 6 + 2)


COSTS: dict[str, dict[str, Any]] = {
    "equal": {},
    "unequal": {"forward": (1, 2, 0.5), "input_grad": (0.6, 1.5, 1.4), "weight_grad": (1.1, 0.4, 0.9)},
    "overheads": {"latency": 0.3, "dispatch": 0.1, "step": (1, 0, 2), "bandwidth": 4, "message_bytes": 1},
    "no weights": {"weight_grad": 0.0},
}


@pytest.mark.parametrize("costs", COSTS)
def test_no_family_is_below_the_bound_at_its_own_memory(costs: str) -> None:
    compared = 0
    for name, m, count in product(SCHEDULES, range(1, 10), (1, 2, 3)):
        if not SCHEDULES[name].synchronous or name == "searched":
            continue
        try:
            schedule = build_schedule(name, 3, m, stages_per_rank=count)
        except ScheduleError:
            continue
        placement = schedule.placement
        times = Costs.from_rank_shares(placement, **COSTS[costs])
        room = capacities(peak_activations(schedule), placement.stages_per_rank)
        bound = lower_bound(SearchProblem(placement, m, times, room))
        assert bound <= simulate(schedule, times).makespan + 1e-9, (name, m, count)
        compared += 1
    assert compared > 100
