"""Recompute ahead of the gradient's arrival: R actions, put where the simulator says that a bubble hides them.

A stage that recomputes starts to do so when the gradient is there. With an R right before the backward it starts when
the rank is free, and has all activations when the gradient arrives: what fits into the wait costs no time. There are
such waits at the end of the warmup and in the cooldown; where there is none, it takes as long as before. The price is
memory: an R recomputes the whole stage at once, not block by block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import simulate

__all__ = ["insert_recomputes", "recompute_ahead"]

_TOLERANCE = 1e-9


def insert_recomputes(schedule: Schedule, stages: Collection[int]) -> Schedule:
    """Return the schedule with an R right before every backward of `stages`.

    Raises:
        ScheduleError: there is no such stage.
    """
    for stage in stages:
        if not 0 <= stage < schedule.num_stages:
            raise ScheduleError(f"there is no stage {stage} to recompute ahead, only 0 to {schedule.num_stages - 1}")
    return replace(schedule, orders=tuple(tuple(_with_recomputes(order, stages)) for order in schedule.orders))


def recompute_ahead(
    schedule: Schedule, costs: Costs, allowed: Collection[int] | None = None
) -> tuple[Schedule, tuple[int, ...]]:
    """Insert an R before the backwards of every stage where that makes the schedule end earlier.

    Args:
        schedule: a legal schedule.
        costs: `recompute` says which stages recompute, and for how long.
        allowed: the stages that have the memory for it; None: all.

    Returns:
        The schedule, and the stages that recompute ahead.

    Raises:
        ScheduleError: the costs are for another number of stages.
    """
    possible = [
        stage for stage, time in enumerate(costs.recompute) if time > 0 and (allowed is None or stage in allowed)
    ]
    if not possible:
        return schedule, ()
    ahead = insert_recomputes(schedule, possible)
    best = simulate(ahead, costs).makespan
    if best >= simulate(schedule, costs).makespan * (1 - _TOLERANCE):
        return schedule, ()
    return _without_idle_ones(schedule, costs, possible, best)


def _without_idle_ones(
    schedule: Schedule, costs: Costs, stages: Sequence[int], best: float
) -> tuple[Schedule, tuple[int, ...]]:
    """Leave out the stages that gain nothing by recomputing ahead: they need not pay for it in memory."""
    chosen = list(stages)
    for stage in stages:
        fewer = [other for other in chosen if other != stage]
        if simulate(insert_recomputes(schedule, fewer), costs).makespan <= best * (1 + _TOLERANCE):
            chosen = fewer
    return insert_recomputes(schedule, chosen), tuple(chosen)


def _with_recomputes(order: Sequence[Action], stages: Collection[int]) -> Iterator[Action]:
    for action in order:
        if action.kind in (Kind.B, Kind.I) and action.stage in stages:
            yield Action(action.stage, Kind.R, action.microbatch)
        yield action
