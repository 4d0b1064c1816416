from __future__ import annotations

from typing import Any

import pytest

from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.schedule import uses_split_backward
from vpipe.schedule.search.problem import SearchProblem
from vpipe.schedule.search.timing import Timing, find_whole_backwards
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import simulate

SPLIT = [name for name in SCHEDULES if name != "searched" and uses_split_backward(build_schedule(name, 4, 8))]
TIMES: dict[str, Any] = {"forward": (1, 2, 0.5), "weight_grad": (0.25, 1, 1.5), "step": (0, 3, 1), "latency": 0.5}


def _problem(name: str, p: int, m: int, **times: Any) -> tuple[SearchProblem, list[list[int]]]:
    schedule = build_schedule(name, p, m)
    costs = Costs.from_rank_shares(schedule.placement, **times)
    problem = SearchProblem(schedule.placement, m, costs, (99,) * p)
    return problem, problem.read(schedule)


@pytest.mark.parametrize("name", SPLIT)
def test_it_agrees_with_the_simulator(name: str) -> None:
    for m in (1, 4, 7):
        problem, orders = _problem(name, 3, m, **TIMES)
        timing = Timing(problem)
        assert timing.run(orders)
        split = problem.write(name, orders)
        simulation = simulate(split, problem.costs)
        assert timing.makespan * problem.unit == simulation.makespan
        for order, events in zip(orders, simulation.events, strict=True):
            heads = [timing.heads[operation] * problem.unit for operation in order]
            assert heads == [event.start for event in events[: len(order)]]


def test_heads_and_tails_meet_on_a_longest_path() -> None:
    problem, orders = _problem("zb-v", 3, 6, **TIMES)
    timing = Timing(problem)
    timing.run(orders)
    timing.run_back()
    through = [head + tail for head, tail in zip(timing.heads, timing.tails, strict=True)]
    assert max(through) == timing.makespan
    assert sum(length == timing.makespan for length in through) >= 2 * 3  # it visits all ranks and comes back
    firsts = [order[0] for order in orders]
    assert max(timing.tails[first] for first in firsts) == timing.makespan


def test_ranks_that_wait_for_each_other_are_told() -> None:
    problem, (first, last) = _problem("1f1b", 2, 2)
    stuck = [[0, 2, 4, 1, 3, 5], [6, 7, 8, 9, 10, 11]]  # rank 0 wants a gradient before its second forward
    assert Timing(problem).run([first, last])
    assert not Timing(problem).run(stuck)


def test_whole_backwards_cost_no_time() -> None:
    problem, orders = _problem("gpipe", 4, 3)
    # Split, the gradient goes on before the weights' half: only the first stage may wait for the whole.
    timing = Timing(problem)
    timing.run(orders)
    whole = find_whole_backwards(problem, orders)
    assert 0 in whole
    assert whole != {0, 1, 2, 3}
    schedule = problem.write("gpipe", orders, whole)
    assert simulate(schedule, problem.costs).makespan == timing.makespan * problem.unit
