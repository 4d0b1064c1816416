"""Move older weight versions to host memory and back: where OFFLOAD_V and FETCH_V stand in a schedule.

A stage that updates while microbatches are in flight keeps a weight version for each of them. The newest is used by
forwards and changed by updates, and one of the others by the next backward; the rest only wait. So an OFFLOAD_V copies
the newest version out while it is still in use, and the update that follows takes its place. A FETCH_V stands one
computation ahead of the version's next use. Ahead of a backward it stands behind the update before that, which has no
more need of the weights of the backward before, and so has freed a place: then there are never more than
`DEVICE_VERSIONS` on the device. With vertical sync, where forwards use older versions too, there may be more.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.problem import Violation
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.weights import StageWeights, weight_usage

__all__ = ["DEVICE_VERSIONS", "check_version_moves", "insert_version_moves"]

DEVICE_VERSIONS = 2

_USES = frozenset({Kind.F, Kind.B, Kind.I, Kind.W, Kind.R})
"""Computations, all of which use the weights; an update changes them."""


def insert_version_moves(schedule: Schedule, stages: Collection[int]) -> Schedule:
    """Return the schedule with an OFFLOAD_V and a FETCH_V for those weight versions of `stages` that wait.

    Stages where that leaves no fewer on the device are left alone, and so are those that have such actions.

    Raises:
        ScheduleError: there is no such stage.
    """
    for stage in stages:
        if not 0 <= stage < schedule.num_stages:
            raise ScheduleError(
                f"there is no stage {stage} whose weight versions could be moved, only 0 to {schedule.num_stages - 1}"
            )
    if not stages or schedule.synchronous:
        return schedule
    usage = weight_usage(schedule)
    placed = {action.stage for order in schedule.orders for action in order if action.kind is Kind.OFFLOAD_V}
    moving = [stage for stage in sorted(set(stages) - placed) if usage[stage].num_versions > DEVICE_VERSIONS]
    moved = _move(schedule, moving, usage)
    on_device = [weights.num_on_device for weights in weight_usage(moved)]
    useful = [stage for stage in moving if on_device[stage] < usage[stage].num_versions]
    return moved if useful == moving else _move(schedule, useful, usage)


def _move(schedule: Schedule, stages: Collection[int], usage: Sequence[StageWeights]) -> Schedule:
    if not stages:
        return schedule
    orders = list(schedule.orders)
    for stage in stages:
        rank = schedule.position_of(stage)
        orders[rank] = tuple(_with_moves(orders[rank], stage, usage[stage].version_of))
    return replace(schedule, orders=tuple(orders))


def _with_moves(order: Sequence[Action], stage: int, version_of: Sequence[int]) -> Iterator[Action]:
    """Yield the order with the moves of one stage."""
    computed = [0, *accumulate(action.kind in _USES for action in order)]
    computing = [index for index, action in enumerate(order) if action.kind in _USES]
    updates = [index for index, action in enumerate(order) if action.stage == stage and action.kind is Kind.STEP]
    fetches: dict[int, list[Action]] = {}
    offloads: dict[int, Action] = {}
    for version, (replaced, use) in _waits(order, stage, version_of, updates).items():
        back = _place_of_fetch(order, computing, updates, use, replaced)
        if computed[back] == computed[replaced]:
            continue  # no time to be away
        out = updates[version - 1] + 1 if version else 0
        following = computing[bisect_left(computing, out)]
        if order[following].kind is Kind.F:
            out = following + 1  # what comes back for the next backward goes first
        fetches.setdefault(back, []).append(Action(stage, Kind.FETCH_V, order[use].microbatch))
        offloads[out] = Action(stage, Kind.OFFLOAD_V, order[use].microbatch)
    for index, action in enumerate(order):
        yield from fetches.get(index, ())
        if index in offloads:
            yield offloads[index]
        yield action


def _waits(
    order: Sequence[Action], stage: int, version_of: Sequence[int], updates: Sequence[int]
) -> dict[int, tuple[int, int]]:
    """Return, for each version that is used again after it was replaced, the places of its replacement and that use."""
    found: dict[int, tuple[int, int]] = {}
    for index, action in enumerate(order):
        if action.stage == stage and action.kind in _USES:
            version = version_of[action.microbatch]
            if version not in found and version < bisect_left(updates, index):
                found[version] = updates[version], index
    return found


def _place_of_fetch(
    order: Sequence[Action], computing: Sequence[int], updates: Sequence[int], use: int, replaced: int
) -> int:
    """Return the place in front of which the FETCH_V for the computation at `use` goes."""
    place = max(computing[bisect_left(computing, use) - 1], replaced + 1)
    if order[use].kind is not Kind.F:
        place = max(place, updates[bisect_right(updates, use) - 1] + 1)
    return place


def check_version_moves(schedule: Schedule) -> Iterator[Violation]:
    """Yield what is wrong with moves of weight versions, in a schedule whose versions are all made in time.

    The newest version is copied, no version twice; it comes back after it was replaced; meanwhile nobody uses it.
    """
    if not any(action.kind is Kind.OFFLOAD_V for order in schedule.orders for action in order):
        return
    usage = weight_usage(schedule)
    for rank, order in enumerate(schedule.orders):
        yield from _check_rank(rank, order, [weights.version_of for weights in usage])


def _check_rank(rank: int, order: Sequence[Action], versions_of: Sequence[Sequence[int]]) -> Iterator[Violation]:
    newest = dict.fromkeys((action.stage for action in order), 0)
    moved: dict[tuple[int, int], Action] = {}  # what stage and version are brought back by
    away: set[tuple[int, int]] = set()
    for index, action in enumerate(order):
        stage, kind = action.stage, action.kind
        version = versions_of[stage][action.microbatch]
        key, reason = (stage, version), ""
        if kind is Kind.STEP:
            newest[stage] += 1
        elif kind is Kind.OFFLOAD_V:
            if key in moved:
                reason = f"{action} moves weight version {version} of stage {stage}, which moves already"
            elif version != newest[stage]:
                reason = (
                    f"{action} moves weight version {version} of stage {stage}, but the newest there is version "
                    f"{newest[stage]}; put it between the updates that make and replace version {version}"
                )
            moved[key] = Action(stage, Kind.FETCH_V, action.microbatch)
            away.add(key)
        elif kind is Kind.FETCH_V:
            away.discard(key)
            if version == newest[stage]:
                reason = f"{action} brings back weight version {version} of stage {stage}, which no update has replaced"
        elif kind in _USES and key in away and version < newest[stage]:
            reason = (
                f"{action} uses weight version {version} of stage {stage}, which is in host memory until {moved[key]}; "
                "put that before it"
            )
        if reason:
            yield Violation(reason, ((rank, index),))
