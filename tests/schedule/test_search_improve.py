from __future__ import annotations

from random import Random
from typing import Any

import pytest

from vpipe.schedule.memory import peak_activations
from vpipe.schedule.proof.validate import check_schedule
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.search.improve import improve
from vpipe.schedule.search.problem import SearchProblem
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import simulate

# None of the families below is at its best with these.
UNEQUAL: dict[str, Any] = {
    "forward": (1, 1.6, 0.8, 1.2),
    "input_grad": (1.4, 0.6, 1, 0.7),
    "weight_grad": (0.5, 1, 1.3, 1),
}


def _start(name: str, m: int, **times: Any) -> tuple[SearchProblem, list[list[int]]]:
    schedule = build_schedule(name, 4, m)
    placement = schedule.placement
    room = tuple(round(peak * placement.stages_per_rank) for peak in peak_activations(schedule))
    problem = SearchProblem(placement, m, Costs.from_rank_shares(placement, **times), room)
    return problem, problem.read(schedule)


@pytest.mark.parametrize("name", ["zb-h1", "zb-v", "v-half", "interleaved", "gpipe"])
def test_it_shortens_a_family_within_its_own_memory(name: str) -> None:
    problem, orders = _start(name, 8, **UNEQUAL)
    before = simulate(problem.write(name, orders), problem.costs).makespan
    found, makespan, swaps = improve(problem, orders, 200, Random(0), 0, 200)
    schedule = problem.write(name, found)
    assert 0 < swaps <= 200
    assert simulate(schedule, problem.costs).makespan == pytest.approx(makespan * problem.unit, abs=1e-5)
    assert makespan * problem.unit < before - 0.01
    assert check_schedule(schedule) == []
    peaks = peak_activations(schedule)
    stages_per_rank = problem.placement.stages_per_rank
    assert all(peak * stages_per_rank <= room for peak, room in zip(peaks, problem.capacity, strict=True))


def test_it_ends_at_the_goal_or_when_nothing_better_comes() -> None:
    problem, orders = _start("zb-h1", 8, **UNEQUAL)
    before = orders[0][:]
    everything = 10**12
    assert improve(problem, orders, 100, Random(0), everything, 100)[2] == 0
    assert improve(problem, orders, 10**6, Random(0), 0, 5)[2] < 1000
    assert orders[0] == before  # what it was given stays as it was


def test_the_same_seed_finds_the_same() -> None:
    problem, orders = _start("v-half", 6, **UNEQUAL)
    assert improve(problem, orders, 150, Random(3), 0, 150) == improve(problem, orders, 150, Random(3), 0, 150)


def test_times_of_zero_do_no_harm() -> None:
    problem, orders = _start("zb-v", 6, input_grad=0.0, forward=(1, 2, 1, 0))
    found, _, _ = improve(problem, orders, 100, Random(0), 0, 100)
    assert check_schedule(problem.write("zb-v", found)) == []
