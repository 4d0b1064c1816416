from __future__ import annotations

import pytest

from vpipe.schedule.placement import Placement
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.search.problem import SearchProblem, capacities
from vpipe.schedule.simulate.costs import Costs


def _problem(schedule: Schedule, **times: float) -> SearchProblem:
    placement = schedule.placement
    costs = Costs.from_rank_shares(placement, **times)
    return SearchProblem(placement, schedule.num_microbatches, costs, (99,) * placement.num_ranks)


def test_limits_count_in_whole_ranks() -> None:
    assert capacities([3, 2.5, 1.99], 1) == (3, 2, 1)
    assert capacities([3, 2.5, 1.99], 2) == (6, 5, 3)
    assert capacities([0.1 * 3 * 10], 1) == (3,)


def test_an_operation_is_a_number() -> None:
    schedule = build_schedule("1f1b", 2, 3)
    problem = _problem(schedule)
    assert problem.read(schedule) == [[0, 1, 3, 6, 2, 4, 7, 5, 8], [9, 12, 15, 10, 13, 16, 11, 14, 17]]


@pytest.mark.parametrize("name", ["zb-h1", "zb-v", "v-half"])
def test_orders_of_split_backwards_go_round(name: str) -> None:
    schedule = build_schedule(name, 3, 5)
    problem = _problem(schedule)
    assert problem.write(name, problem.read(schedule)).orders == schedule.orders


def test_neighbours_become_full_backwards_where_asked() -> None:
    schedule = build_schedule("1f1b", 2, 2)
    problem = _problem(schedule)
    orders = problem.read(schedule)
    assert problem.write("1f1b", orders, frozenset({0, 1})) == schedule
    mixed = problem.write("1f1b", orders, frozenset({0}))
    assert [" ".join(map(str, order)) for order in mixed.orders] == [
        "0F0 0F1 0B0 0B1 0STEP1",
        "1F0 1I0 1W0 1F1 1I1 1W1 1STEP1",
    ]


def test_times_are_whole_numbers_of_a_tiny_unit() -> None:
    problem = _problem(build_schedule("gpipe", 2, 2), forward=0.75, weight_grad=1 / 3, step=0.5, latency=0.25)
    assert [time * problem.unit for time in problem.durations[:2]] == [0.75, 1]
    assert problem.durations[2] * problem.unit == pytest.approx(1 / 3, abs=1e-7)
    assert [time * problem.unit for time in problem.endings] == [0.5, 0.5]
    assert [[time * problem.unit for time in lags] for lags in problem.lags] == [[0.25], [0.25]]
    assert _problem(build_schedule("gpipe", 1, 1), forward=0, input_grad=0, weight_grad=0).unit == 1


def test_links_of_each_letter() -> None:
    loop = SearchProblem(Placement(2, 2), 1, Costs.from_rank_shares(Placement(2, 2)), (4, 4))
    assert loop.channels[0] == (None, (0, 1))
    assert loop.channels[3 * 1] == ((0, 1), (1, 0))
    assert loop.channels[3 * 2 + 1] == ((1, 0), (0, 1))
    v = SearchProblem(Placement(2, 2, "v"), 1, Costs.from_rank_shares(Placement(2, 2, "v")), (4, 4))
    assert v.channels[3 * 1] == ((0, 1), None)  # the point of the V is on one rank
