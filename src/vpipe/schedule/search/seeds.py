"""Orders to start from: what list scheduling gives under many policies, first a table of them, then variations.

The table crosses three questions: which letter goes first (a gradient or a forward; of the later or of the earlier
stage), whether a rank waits for an input under way, and whether a stage runs ahead as far as memory lets it or, as in
1F1B, no further than it is away from the end. Variations change one of the best policy's answers, of one rank or stage,
and stay when they are no worse: random, but of a fixed seed, so that every rank finds the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from random import Random
from typing import TypeVar

from vpipe.schedule.search.list import ListPolicy
from vpipe.schedule.search.problem import SearchProblem

__all__ = ["table_of_policies", "vary"]

T = TypeVar("T")

_LATER = 1 << 20
_PATIENCE = (0.5, 0.0, 1.0)


def table_of_policies(problem: SearchProblem) -> Iterator[ListPolicy]:
    """Yield the policies of the table, the most promising first."""
    stages, ranks = problem.placement.num_stages, problem.placement.num_ranks
    room = [problem.capacity[problem.rank_of[stage]] for stage in range(stages)]
    ahead = (room, [min(most, stages - stage) for stage, most in enumerate(room)])
    firsts = ((True, True), (False, True), (True, False), (False, False))
    for patience, in_flight, (gradients, later) in product(_PATIENCE, ahead, firsts):
        priority = []
        for stage in range(stages):
            place = stages - stage if later else stage
            priority += [place + _LATER * gradients, place + _LATER * (not gradients), place]
        yield ListPolicy(tuple(priority), tuple(in_flight), (patience,) * ranks)


def vary(problem: SearchProblem, policy: ListPolicy, random: Random) -> ListPolicy:
    """Return `policy` with one answer changed."""
    question = random.randrange(3)
    if question == 0:
        stage = random.randrange(len(policy.in_flight))
        most = min(problem.capacity[problem.rank_of[stage]], problem.num_microbatches)
        near = policy.in_flight[stage] + random.choice((-2, -1, 1, 2))
        return replace(policy, in_flight=_changed(policy.in_flight, stage, max(1, min(near, most))))
    if question == 1:
        rank = random.randrange(len(policy.patience))
        return replace(
            policy, patience=_changed(policy.patience, rank, random.choice((0.0, 0.25, 0.5, 0.75, 1.0, 1.5)))
        )
    # Exchange what two letters of one rank are worth.
    own = problem.stages_of[random.randrange(len(problem.stages_of))]
    letters = [3 * stage + kind for stage in own for kind in (0, 1)]
    one, other = random.sample(letters, 2)
    priority = _changed(policy.priority, one, policy.priority[other])
    return replace(policy, priority=_changed(priority, other, policy.priority[one]))


def _changed(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])
