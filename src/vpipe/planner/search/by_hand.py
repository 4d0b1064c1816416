"""A partition given by hand or by name, judged in every setting that it can be of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from vpipe.errors import PlanError
from vpipe.plan.partition import Partition
from vpipe.plan.policy import Policy
from vpipe.planner.cut.candidates import naive_cuts
from vpipe.planner.search.candidate import Candidate
from vpipe.planner.search.situation import Situation

__all__ = ["Given", "cut_each", "judge_cut", "policies_of"]

Given = Sequence[Policy] | Callable[[Sequence[int]], Sequence[Policy] | None] | None
"""Policies of all blocks, or what tells them for a cut; None leaves them to the planner."""


def policies_of(given: Given, partition: Sequence[int]) -> Sequence[Policy] | None:
    """Return the policies that are given for a cut; None where the planner may choose."""
    return given(partition) if callable(given) else given


def cut_each(
    situations: Sequence[Situation], partition: Sequence[int] | str
) -> Iterator[tuple[Situation, Sequence[int]]]:
    """Yield each situation with its cut: a name cuts all of them, a list is for those with as many stages.

    Raises:
        PlanError: there is no such name, or the list does not cut the model into the stages.
    """
    if isinstance(partition, str):
        for situation in situations:
            cuts = naive_cuts(situation.times)
            if partition not in cuts:
                raise PlanError(
                    f"partition '{partition}' is unknown; use auto, {', '.join(cuts)}, or blocks per stage such as "
                    "12,13,13,11"
                )
            yield situation, cuts[partition]
        return
    able = [each for each in situations if each.schedule.num_stages == len(partition)]
    for situation in able or situations[:1]:
        yield situation, Partition.checked(partition, len(situation.chain), situation.schedule.num_stages)


def judge_cut(
    situation: Situation, partition: Sequence[int], policies: Sequence[Policy], ahead: Collection[int] | None
) -> Candidate:
    """Simulate a cut; None lets those stages recompute ahead of the gradient that gain by it and have the memory."""
    plan = situation.judge(situation.draft(partition, policies, ahead or ()))
    return situation.recompute_earlier(plan) if ahead is None else plan
