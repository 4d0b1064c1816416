from __future__ import annotations

from itertools import product
from random import Random

import pytest

from vpipe.schedule.memory import peak_activations
from vpipe.schedule.placement import Placement
from vpipe.schedule.proof.validate import check_schedule
from vpipe.schedule.search.list import ListPolicy, build_list_order
from vpipe.schedule.search.problem import SearchProblem, capacities
from vpipe.schedule.search.seeds import table_of_policies, vary
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import simulate


def _problem(placement: Placement, m: int, limit: float) -> SearchProblem:
    room = capacities([limit] * placement.num_ranks, placement.stages_per_rank)
    return SearchProblem(placement, m, Costs.from_rank_shares(placement), room)


def _greedy(problem: SearchProblem) -> ListPolicy:
    """Gradients first, wait for nothing, run ahead as far as memory allows."""
    stages, ranks = problem.placement.num_stages, problem.placement.num_ranks
    return ListPolicy((1, 0, 2) * stages, (max(problem.capacity),) * stages, (0.0,) * ranks)


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_with_the_memory_of_zb_h2_it_is_as_short(p: int) -> None:
    problem = _problem(Placement(p), 2 * p, 2 * p - 1)
    orders = build_list_order(problem, _greedy(problem))
    assert orders is not None
    assert simulate(problem.write("list", orders)).makespan == 6 * p + p - 1


def test_a_rank_waits_for_what_comes_soon_if_it_is_patient() -> None:
    placement = Placement(2)
    costs = Costs.from_rank_shares(placement, weight_grad=(1, 4), input_grad=(0.25, 1))
    problem = SearchProblem(placement, 2, costs, (2, 2))
    makespans = []
    for patience in (0.0, 1.0):
        policy = ListPolicy((1, 0, 2) * 2, (2, 1), (0.0, patience))
        orders = build_list_order(problem, policy)
        assert orders is not None
        makespans.append([operation - 6 for operation in orders[1]])
    # One in flight: after F0 I0 the impatient takes W0 at once if F1 is not there; here it is, so both agree.
    assert makespans[0][:2] == makespans[1][:2] == [0, 2]


@pytest.mark.parametrize("style", ["line", "v", "loop"])
def test_every_policy_is_legal_and_within_the_memory(style: str) -> None:
    random = Random(0)
    tried = 0
    for p, m, limit in product((1, 2, 3, 5), (1, 4, 7), (1, 1.5, 3)):
        placement = Placement(p) if style == "line" else Placement(p, 2, "v" if style == "v" else "loop")
        problem = _problem(placement, m, limit)
        policies = list(table_of_policies(problem))
        policies += [vary(problem, random.choice(policies), random) for _ in range(12)]
        for policy in policies:
            orders = build_list_order(problem, policy)
            if orders is None:
                assert style == "loop"  # messages for several stages share a link there
                continue
            schedule = problem.write("list", orders)
            assert check_schedule(schedule) == [], (p, m, limit, policy)
            assert max(peak_activations(schedule)) <= limit
            tried += 1
    assert tried > 500


def test_policies_differ() -> None:
    problem = _problem(Placement(4, 2, "v"), 8, 3)
    table = list(table_of_policies(problem))
    assert len(set(table)) == len(table) == 24
    random = Random(1)
    assert len({vary(problem, table[0], random) for _ in range(50)}) > 20
    assert all(min(vary(problem, table[0], random).in_flight) >= 1 for _ in range(50))
