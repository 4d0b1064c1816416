"""Random changes stay legal and within the memory, and reach what swaps on one rank cannot."""

from __future__ import annotations

from random import Random

import pytest

from vpipe.schedule.memory import peak_activations
from vpipe.schedule.placement import Placement
from vpipe.schedule.proof.validate import check_schedule
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.search.problem import Orders, SearchProblem
from vpipe.schedule.search.shake import shake
from vpipe.schedule.simulate.costs import Costs


def _start(name: str, p: int, m: int, stages_per_rank: int | None = None) -> tuple[SearchProblem, Orders]:
    schedule = build_schedule(name, p, m, stages_per_rank=stages_per_rank)
    placement = schedule.placement
    room = tuple(round(peak * placement.stages_per_rank) for peak in peak_activations(schedule))
    problem = SearchProblem(placement, m, Costs.from_rank_shares(placement), room)
    return problem, problem.read(schedule)


@pytest.mark.parametrize(
    ("name", "stages_per_rank"),
    [("1f1b", None), ("zb-h2", None), ("interleaved", 2), ("interleaved", 3), ("looped-bfs", 2), ("zb-v", None)],
)
@pytest.mark.parametrize("p", [2, 4])
def test_what_comes_out_is_legal_within_the_memory_and_something_else(
    name: str, stages_per_rank: int | None, p: int
) -> None:
    problem, orders = _start(name, p, 5, stages_per_rank)
    seen = set()
    for seed in range(15):
        changed = shake(problem, orders, 8, Random(seed))
        schedule = problem.write(name, changed)
        assert check_schedule(schedule) == []
        peaks = [peak * problem.placement.stages_per_rank for peak in peak_activations(schedule)]
        assert all(peak <= room for peak, room in zip(peaks, problem.capacity, strict=True))
        seen.add(schedule.fingerprint())
    assert len(seen) > 10
    assert orders == problem.read(build_schedule(name, p, 5, stages_per_rank=stages_per_rank))


def test_messages_over_one_link_change_places_on_both_ends() -> None:
    problem, orders = _start("looped-bfs", 3, 2)
    width = problem.num_microbatches

    def forwards(changed: Orders) -> list[list[tuple[int, int]]]:
        """Per rank, whether it is the first or the second time around, and which microbatch."""
        sequences = []
        for order in changed:
            letters = [(operation // width, operation % width) for operation in order]
            sequences.append([(letter // 9, number) for letter, number in letters if letter % 3 == 0])
        return sequences

    assert forwards(orders) == [[(0, 0), (0, 1), (1, 0), (1, 1)]] * 3
    found = {tuple(map(tuple, forwards(shake(problem, orders, 30, Random(seed))))) for seed in range(10)}
    taken_in_turn = ((0, 0), (1, 0), (0, 1), (1, 1))
    assert (taken_in_turn,) * 3 in found
    assert all(len(set(sequences)) == 1 for sequences in found)


def test_nothing_to_change() -> None:
    problem = SearchProblem(Placement(1), 1, Costs.from_rank_shares(Placement(1)), (1,))
    assert shake(problem, [[0, 1, 2]], 5, Random(0)) == [[0, 1, 2]]
