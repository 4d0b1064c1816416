"""Move activations to host memory and back: where OFFLOAD and FETCH stand in a schedule.

An OFFLOAD stands after its forward. It waits until the one before it on its rank is over, so no more than one
microbatch is on its way out. A FETCH stands one computation ahead of its backward, which hides it. The host link does
one after another in this order, so of a stage that swaps there are never more than `DEVICE_COPIES` microbatches on the
device: the one that is computed on, and one that is on its way out or back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.schedule import Schedule

__all__ = ["DEVICE_COPIES", "insert_offloads"]

DEVICE_COPIES = 2
_LEAST_BETWEEN = 2
"""Computations between a forward and its backward under which there is no time to be away."""

_COMPUTING = frozenset({Kind.F, Kind.B, Kind.I, Kind.W, Kind.R})
_BACKWARD = frozenset({Kind.B, Kind.I})


def insert_offloads(schedule: Schedule, stages: Collection[int]) -> Schedule:
    """Return the schedule with an OFFLOAD and a FETCH for the microbatches of `stages` that are away for a while.

    Stages that never have more than `DEVICE_COPIES` microbatches in flight are left alone, as there is nothing to gain,
    and so are those that have such actions.

    Raises:
        ScheduleError: there is no such stage.
    """
    for stage in stages:
        if not 0 <= stage < schedule.num_stages:
            raise ScheduleError(f"there is no stage {stage} to swap, only 0 to {schedule.num_stages - 1}")
    placed = {action.stage for order in schedule.orders for action in order if action.kind is Kind.OFFLOAD}
    moving = {
        stage for stage in set(stages) - placed if _most_in_flight(schedule.stage_order(stage), stage) > DEVICE_COPIES
    }
    if not moving:
        return schedule
    return replace(schedule, orders=tuple(tuple(_with_moves(order, moving)) for order in schedule.orders))


def _most_in_flight(order: Sequence[Action], stage: int) -> int:
    held = most = 0
    for action in order:
        if action.stage == stage:
            held += (action.kind is Kind.F) - (action.kind in _BACKWARD)
            most = max(most, held)
    return most


def _with_moves(order: Sequence[Action], stages: Collection[int]) -> Iterator[Action]:
    after: dict[int, Action] = {}
    before: dict[int, list[Action]] = {}
    forwards: dict[tuple[int, int], int] = {}
    computing = [index for index, action in enumerate(order) if action.kind in _COMPUTING]
    for number, index in enumerate(computing):
        action = order[index]
        key = action.stage, action.microbatch
        if action.kind is Kind.F:
            forwards[key] = number
        elif action.kind in _BACKWARD and action.stage in stages:
            # A recomputation right before the backward belongs to it.
            last = order[computing[number - 1]]
            start = number - (last.kind is Kind.R and (last.stage, last.microbatch) == key)
            if start - forwards[key] - 1 >= _LEAST_BETWEEN:
                after[computing[forwards[key]]] = Action(action.stage, Kind.OFFLOAD, action.microbatch)
                fetch = Action(action.stage, Kind.FETCH, action.microbatch)
                before.setdefault(computing[start - 1], []).append(fetch)
    late: Action | None = None
    for index, action in enumerate(order):
        if late is not None and action.kind is not Kind.OFFLOAD_V:  # for that an update waits
            yield late
            late = None
        yield from before.get(index, ())
        yield action
        late = after.get(index, late)
