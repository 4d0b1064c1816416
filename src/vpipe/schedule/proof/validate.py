"""Prove a schedule legal without running it.

The checks build on each other, so a later group only runs when the earlier ones found nothing: the right actions on the
right ranks; their order on each rank; updates that cover every gradient; weight versions that exist, and are there; no
deadlock.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from vpipe.errors import ScheduleError
from vpipe.schedule.action import COMPUTE, MOVES, Action, Kind
from vpipe.schedule.passes.version_moves import check_version_moves
from vpipe.schedule.problem import Violation, marked_orders
from vpipe.schedule.proof.deadlock import find_deadlock, find_disorder
from vpipe.schedule.schedule import Schedule, WeightRule
from vpipe.schedule.weights import find_unavailable, unavailable_reason, weight_usage

__all__ = ["check_schedule", "validate_schedule"]

_SHOWN = 10


def check_schedule(schedule: Schedule) -> list[str]:
    """Return the reasons why `schedule` is not legal; none when it is.

    Legal means: every microbatch goes forward and backward exactly once per stage, on the rank that holds the stage;
    what an action needs comes before it; the gradients of a stage accumulate in microbatch order and every one of them
    is applied by an update; a forward finds the weight version it needs; ranks cannot deadlock, neither with messages
    matched by tag (gloo) nor by order (NCCL).
    """
    return [problem.reason for problem in _find_problems(schedule)]


def validate_schedule(schedule: Schedule) -> None:
    """Check that `schedule` is legal.

    Raises:
        ScheduleError: it is not; the text has the reasons and the grid with the bad cells marked.
    """
    problems = _find_problems(schedule)
    if not problems:
        return
    reasons = [f"- {problem.reason}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        reasons.append(f"- and {len(problems) - _SHOWN} more")
    cells = {cell for problem in problems[:_SHOWN] for cell in problem.cells}
    text = "\n".join([f"schedule '{schedule.name}' is not legal:", *reasons, *marked_orders(schedule, cells)])
    raise ScheduleError(text)


def _find_problems(schedule: Schedule) -> list[Violation]:
    for checks in (
        (_check_size,),
        (_check_places,),
        (_check_completeness,),
        (_check_order, _check_gradient_order, _check_updates),
        (_check_versions,),
        (check_version_moves,),
        (find_deadlock,),
        (find_disorder,),
    ):
        problems = list(chain.from_iterable(check(schedule) for check in checks))
        if problems:
            return problems
    return []


def _check_size(schedule: Schedule) -> Iterator[Violation]:
    if len(schedule.orders) != schedule.num_ranks:
        yield Violation(f"{len(schedule.orders)} orders for {schedule.num_ranks} ranks; give one per rank")
    if schedule.num_microbatches < 1:
        yield Violation(f"num_microbatches is {schedule.num_microbatches}; a schedule needs at least 1")


def _check_places(schedule: Schedule) -> Iterator[Violation]:
    """Each action by itself: a computation of an existing stage and microbatch, on the stage's rank, listed once."""
    for rank, order in enumerate(schedule.orders):
        seen: set[Action] = set()
        for index, action in enumerate(order):
            reason = _misplaced(schedule, rank, action)
            if action in seen:
                reason = f"{action} is listed twice on rank {rank}"
            if reason:
                yield Violation(reason, ((rank, index),))
            seen.add(action)


def _misplaced(schedule: Schedule, rank: int, action: Action) -> str | None:
    if action.kind not in COMPUTE and action.kind not in MOVES:
        kinds = " ".join(sorted(COMPUTE))
        return f"{action} on rank {rank} is no computation; list only {kinds}, lower() adds the communication"
    if not 0 <= action.stage < schedule.num_stages:
        return f"{action} on rank {rank}: there is no stage {action.stage}, only 0 to {schedule.num_stages - 1}"
    if not 0 <= action.microbatch < schedule.num_microbatches:
        last = schedule.num_microbatches - 1
        return f"{action} on rank {rank}: there is no microbatch {action.microbatch}, only 0 to {last}"
    home = schedule.rank_of(action)
    if home != rank:
        return f"{action} is on rank {rank}, but stage {action.stage} is on rank {home}"
    return None


def _check_completeness(schedule: Schedule) -> Iterator[Violation]:
    """Every microbatch once forward, and once backward: B, or I and W."""
    listed = set(chain.from_iterable(schedule.orders))
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            if Action(stage, Kind.F, microbatch) not in listed:
                yield Violation(
                    f"stage {stage} never runs the forward of microbatch {microbatch} ({stage}F{microbatch})"
                )
            backward = {kind for kind in (Kind.B, Kind.I, Kind.W) if Action(stage, kind, microbatch) in listed}
            if backward not in ({Kind.B}, {Kind.I, Kind.W}):
                found = ", ".join(f"{stage}{kind}{microbatch}" for kind in sorted(backward)) or "nothing"
                yield Violation(
                    f"stage {stage} must run the backward of microbatch {microbatch} once, as B or as I and W; "
                    f"found {found}"
                )
    yield from _check_moves(listed)


def _check_moves(listed: set[Action]) -> Iterator[Violation]:
    """What is moved to host memory comes back, and the other way round."""
    pairs = ((Kind.OFFLOAD, Kind.FETCH), (Kind.OFFLOAD_V, Kind.FETCH_V))
    other = {one: two for pair in pairs for one, two in (pair, pair[::-1])}
    for action in sorted((action for action in listed if action.kind in MOVES), key=str):
        missing = Action(action.stage, other[action.kind], action.microbatch)
        if missing not in listed:
            yield Violation(f"{action} is there and {missing} is not; moving to host memory and back go together")


def _needed_before(schedule: Schedule, action: Action) -> Iterator[Action]:
    """Yield what must come before `action` on its own rank, if it is there at all (B, or I and W in its place)."""
    stage, kind, microbatch = action.stage, action.kind, action.microbatch
    rank = schedule.rank_of(action)
    if kind is Kind.F:
        earlier = Action(stage - 1, Kind.F, microbatch)
        if stage > 0 and schedule.rank_of(earlier) == rank:
            yield earlier
    elif kind in (Kind.B, Kind.I):
        yield Action(stage, Kind.F, microbatch)
        yield Action(stage, Kind.R, microbatch)
        yield Action(stage, Kind.FETCH, microbatch)
        later = Action(stage + 1, Kind.B, microbatch)
        if stage < schedule.num_stages - 1 and schedule.rank_of(later) == rank:
            yield later
            yield Action(stage + 1, Kind.I, microbatch)
    elif kind is Kind.W:
        yield Action(stage, Kind.I, microbatch)
    elif kind in (Kind.R, Kind.OFFLOAD):
        yield Action(stage, Kind.F, microbatch)
    elif kind is Kind.FETCH:
        yield Action(stage, Kind.OFFLOAD, microbatch)
    elif kind is Kind.FETCH_V:
        yield Action(stage, Kind.OFFLOAD_V, microbatch)


def _check_order(schedule: Schedule) -> Iterator[Violation]:
    """Happens-before on each rank; what crosses ranks is the deadlock check's."""
    for rank, order in enumerate(schedule.orders):
        places = {action: index for index, action in enumerate(order)}
        for index, action in enumerate(order):
            for needed in _needed_before(schedule, action):
                if places.get(needed, -1) > index:
                    yield Violation(f"{action} comes before {needed} on rank {rank}, but needs it", ((rank, index),))


def _check_gradient_order(schedule: Schedule) -> Iterator[Violation]:
    for rank, order in enumerate(schedule.orders):
        latest: dict[int, Action] = {}
        for index, action in enumerate(order):
            if action.kind not in (Kind.B, Kind.W):
                continue
            previous = latest.get(action.stage)
            if previous is not None and previous.microbatch > action.microbatch:
                yield Violation(
                    f"{action} comes after {previous}: gradients of a stage accumulate in microbatch order, so that "
                    "every schedule gives the same sums",
                    ((rank, index),),
                )
            latest[action.stage] = action


def _check_updates(schedule: Schedule) -> Iterator[Violation]:
    for rank, order in enumerate(schedule.orders):
        pending: dict[int, list[int]] = {stage: [] for stage in schedule.placement.stages_of(rank)}
        updates = dict.fromkeys(pending, 0)
        for index, action in enumerate(order):
            gradients = pending[action.stage]
            if action.kind in (Kind.B, Kind.W):
                gradients.append(action.microbatch)
            elif action.kind is Kind.STEP:
                reason = _bad_update(action, gradients)
                if reason:
                    yield Violation(reason, ((rank, index),))
                updates[action.stage] += 1
                gradients.clear()
        for stage, gradients in pending.items():
            if gradients:
                named = ", ".join(map(str, gradients[:6])) + (", ..." if len(gradients) > 6 else "")
                yield Violation(
                    f"stage {stage} has no update after the backward of microbatches {named}; add "
                    f"{stage}STEP{max(gradients)}",
                    ((rank, len(order) - 1),),
                )
            elif schedule.synchronous and updates[stage] != 1:
                yield Violation(
                    f"stage {stage} has {updates[stage]} updates; a synchronous schedule has one, at the end"
                )


def _bad_update(update: Action, gradients: list[int]) -> str | None:
    if not gradients:
        return f"{update} has no gradient to apply: no backward of stage {update.stage} since its previous update"
    if update.microbatch != max(gradients):
        right = Action(update.stage, Kind.STEP, max(gradients))
        return f"{update} applies gradients up to microbatch {max(gradients)}; write {right}"
    return None


def _check_versions(schedule: Schedule) -> Iterator[Violation]:
    for stage, microbatch, needed, available in find_unavailable(schedule):
        forward = Action(stage, Kind.F, microbatch)
        rank = schedule.rank_of(forward)
        index = schedule.orders[rank].index(forward)
        yield Violation(unavailable_reason(stage, microbatch, needed, available), ((rank, index),))
        return  # the later ones follow from the first
    if schedule.weight_rule is WeightRule.NEWEST:
        return
    first, *others = (usage.update_of for usage in weight_usage(schedule))
    for stage, update_of in enumerate(others, start=1):
        if update_of != first:
            rule = schedule.weight_rule.value
            yield Violation(
                f"stage {stage} groups its microbatches into other updates than stage 0, so version numbers mean "
                f"different things there; with weight rule '{rule}' all stages must update after the same microbatches"
            )
