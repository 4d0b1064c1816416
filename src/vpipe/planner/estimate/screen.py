"""Of many settings those that promise most: what is planned where planning for all of them would take too long.

Every setting is tried once, larger microbatches only where smaller ones fit: with few microbatches, twice as many as
ranks, and cut so that its stages take as equally long as they can without a look at memory. What the other microbatches
would add is the time of the busiest rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from vpipe.errors import PlanError, ScheduleError
from vpipe.plan.partition import Partition
from vpipe.planner.search.candidate import Candidate
from vpipe.planner.search.search import Outcome, Request, find_plan, judge_partition
from vpipe.schedule.placement import Placement
from vpipe.schedule.registry import build_schedule

__all__ = ["Screened", "find_promising_plan"]

_MAX_TURNS = 10_000
"""Microbatches on ranks, in all settings together, that are planned for without a choice."""
_NUM_PLANNED = 2


@dataclass(frozen=True)
class Screened:
    """How a choice was made before planning."""

    num_settings: int
    planned: tuple[str, ...]
    """Schedule and microbatches of those that were planned."""


def find_promising_plan(request: Request) -> tuple[Outcome, Screened | None]:
    """Find the best plan as `find_plan` does, of the most promising settings where there are too many large ones.

    Raises:
        PlanError, ScheduleError: as `find_plan`.
    """
    counts = request.num_microbatches or ()
    pairs = list(product(request.schedules, counts))
    if len(request.schedules) == 1 or sum(request.num_ranks * count for _, count in pairs) <= _MAX_TURNS:
        return find_plan(request), None
    tried = [attempt for name in request.schedules for attempt in _attempts(request, name, counts)]
    finalists = [pair for *_, pair in sorted(tried)[:_NUM_PLANNED]] or pairs[:1]
    outcome = _find_best(request, finalists)
    words = tuple(f"{name} with {count} microbatches" for name, count in finalists)
    return outcome, Screened(len(pairs), words)


def _find_best(request: Request, pairs: Sequence[tuple[str, int]]) -> Outcome:
    """Plan each setting; raise why the first cannot be planned where none can."""
    found: list[Outcome] = []
    reasons: list[PlanError] = []
    for name, count in pairs:
        try:
            found.append(find_plan(replace(request, schedules=[name], num_microbatches=[count])))
        except PlanError as error:
            reasons.append(error)
    if not found:
        raise reasons[0]
    return min(found, key=lambda outcome: outcome.best.sample_ms)


def _attempts(request: Request, name: str, counts: Sequence[int]) -> Iterator[tuple[bool, float, tuple[str, int]]]:
    """Yield whether a schedule's first cut is too large, its time per sample, and the setting.

    The smallest microbatches come first: where they are too large, larger ones are not tried.
    """
    for count in sorted(counts, reverse=True):
        found = _try(request, name, count)
        if found is not None:
            yield (*found, (name, count))
            if found[0]:
                return


def _try(request: Request, name: str, count: int) -> tuple[bool, float] | None:
    """Return whether a setting's first cut is too large, and its time per sample; None where it cannot be."""
    few = min(count, 2 * request.num_ranks)
    size = request.batch_size // count
    small = replace(request, schedules=[name], num_microbatches=[few], batch_size=few * size)
    blocks = request.profile.at(size).blocks
    try:
        placement = build_schedule(
            name, request.num_ranks, min(few, request.num_ranks), stages_per_rank=request.stages_per_rank
        ).placement
        times = [block.forward_ms + block.backward_ms for block in blocks]
        plan = judge_partition(small, Partition.by_weight(times, placement.num_stages))
    except (PlanError, ScheduleError):
        return None
    step_ms = plan.step_ms + (count - few) * _busiest_ms(plan, placement)
    return not plan.fits(request.usable_limits), step_ms / request.batch_size


def _busiest_ms(plan: Candidate, placement: Placement) -> float:
    """Return the time that the busiest rank takes for a microbatch."""
    return max(sum(plan.stage_ms[stage] for stage in placement.stages_of(rank)) for rank in range(placement.num_ranks))
