"""Plans that are tried: the best policies for a cut, and what is near a plan."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence

from vpipe.plan.partition import Partition
from vpipe.plan.policy import Policy
from vpipe.planner.cut.candidates import candidate_cuts, exchanges, neighbours
from vpipe.planner.search.candidate import Candidate
from vpipe.planner.search.shared_cuts import fast_cuts, shared_policies
from vpipe.planner.search.situation import Situation

__all__ = ["MAX_ACTIONS", "best_policies", "cuts_of", "drafts_of", "fixed_plan", "improve"]

MAX_ACTIONS = 50_000
"""Actions that ranking may simulate, and moving the boundaries of one plan: what takes about a tenth of a second."""
_MOST_CHANGES = 300
"""Plans near one that are looked at."""


def cuts_of(situation: Situation) -> list[list[int]]:
    """Return cuts worth simulating; none where none was found that fits."""
    return fast_cuts(situation) if situation.shares_ranks else candidate_cuts(situation.times)


def drafts_of(situation: Situation, cuts: Iterable[Sequence[int]]) -> Iterator[Candidate]:
    """Yield plans of some cuts with the best policies that fit, without their times."""
    for cut in cuts:
        policies = _policies(situation, cut)
        if policies is not None:
            yield situation.draft(cut, policies)


def best_policies(situation: Situation, partition: Sequence[int]) -> tuple[Policy, ...]:
    """Return the best policies that fit, or keep everything where nothing fits."""
    return _policies(situation, partition) or (Policy.KEEP,) * len(situation.chain)


def fixed_plan(situation: Situation, partition: Sequence[int]) -> Candidate:
    """Judge a cut with the best policies that fit, or with everything kept where nothing fits."""
    return situation.judge(situation.draft(partition, best_policies(situation, partition)))


def improve(situation: Situation, plan: Candidate) -> tuple[Situation, Candidate]:
    """Move boundaries by one block and change policies while the simulator says that it helps, as far as allowed."""
    left = max(1, min(_MOST_CHANGES, MAX_ACTIONS // situation.num_actions))
    improving = True
    while improving and left > 0:
        improving = False
        for draft in _near(situation, plan):
            if left <= 0:
                break
            left -= 1
            if not draft.fits(situation.limits):
                continue
            judged = situation.judge(draft)
            if judged.step_ms < plan.step_ms * (1 - 1e-9):
                plan, improving = judged, True
                break
    return situation, plan


def _near(situation: Situation, plan: Candidate) -> Iterator[Candidate]:
    """Yield drafts of the cuts near a plan's, then of its own with other policies; they need not fit."""
    # Where moving a block makes the busiest rank busier by much, simulating it is a waste.
    most = 1.1 * _busiest(situation, plan.partition)
    yield from drafts_of(situation, (cut for cut in neighbours(plan.partition) if _busiest(situation, cut) <= most))
    if set(plan.policies) != {Policy.KEEP}:
        ends = [*plan.partition.starts, plan.partition.num_blocks]
        ranks = [situation.schedule.position_of(bisect(ends, block) - 1) for block in range(ends[-1])]
        for policies in exchanges(plan.policies, ranks, situation.times.frontiers.policies):
            yield situation.draft(plan.partition, policies)


def _busiest(situation: Situation, partition: Sequence[int]) -> float:
    """Return the time of the busiest rank when nothing is added to it."""
    ranks = [0.0] * situation.schedule.num_ranks
    for stage, (start, stop) in enumerate(Partition(partition).ranges):
        ranks[situation.schedule.position_of(stage)] += float(situation.times.optimistic[stage][start, stop])
    return max(ranks)


def _policies(situation: Situation, partition: Sequence[int]) -> tuple[Policy, ...] | None:
    if situation.shares_ranks:
        return shared_policies(situation, partition)
    return situation.times.policies(partition)
