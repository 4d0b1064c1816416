"""What the stages of one rank hold at the same time, where a rank has several: moments in common.

Each stage's own peak comes at a moment of its own, so what a rank needs is less than the sum of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vpipe.planner.cost.loads import COUNTED, Moment, Replay, StageLoad
from vpipe.schedule.schedule import Schedule

__all__ = ["RankMoments", "rank_moments"]


@dataclass(frozen=True)
class RankMoments:
    """Moments of one rank, any of which may be its peak."""

    stages: tuple[int, ...]
    loads: tuple[StageLoad, ...]
    """Of each of these stages, with what it holds at each of the rank's moments: as many for all of them."""
    computes: NDArray[np.bool_]
    """[i, j] tells whether it is stage i of them that runs at moment j."""


_Row = tuple[int, tuple[Moment, ...]]
"""Which of the rank's stages runs, and what each of them holds."""


def rank_moments(schedule: Schedule, loads: Sequence[StageLoad], rank: int) -> RankMoments:
    """Replay a rank's order; `loads` are `stage_loads(schedule)`. The same moments as `rank_memory` looks at."""
    stages = schedule.placement.stages_of(rank)
    rows = _largest(_rows(schedule, loads, rank))
    columns = zip(*(moments for _, moments in rows), strict=True)
    own = tuple(replace(loads[stage], moments=column) for stage, column in zip(stages, columns, strict=True))
    runs = np.array([place for place, _ in rows])
    return RankMoments(stages, own, runs[None, :] == np.arange(len(stages))[:, None])


def _rows(schedule: Schedule, loads: Sequence[StageLoad], rank: int) -> Iterator[_Row]:
    stages = schedule.placement.stages_of(rank)
    replays = {stage: Replay(schedule, stage, sockets=loads[stage].sockets) for stage in stages}
    now: dict[int, Moment] = {}
    nothing = Moment._make([0] * len(Moment._fields))  # what a stage holds before its first action
    for action in schedule.orders[rank]:
        if action.kind in COUNTED:
            now[action.stage] = replays[action.stage].begin(action)
            held = tuple(now.get(stage, nothing) for stage in stages)
            moving = [place for place, stage in enumerate(stages) if replays[stage].is_moving]
            yield from ((stages.index(action.stage), row) for row in _one_moves(held, moving))
            replays[action.stage].end(action)
            now[action.stage] = replays[action.stage].rest()


def _one_moves(held: tuple[Moment, ...], moving: Sequence[int]) -> Iterator[tuple[Moment, ...]]:
    """Yield what is held when one or another of the stages uses the way to host memory, which carries one at a time."""
    for mover in moving or [-1]:
        yield tuple(
            moment._replace(copies=moment.copies - 1) if place in moving and place != mover else moment
            for place, moment in enumerate(held)
        )


def _largest(rows: Iterable[_Row]) -> list[_Row]:
    """Return those that no other ones cover, in order."""
    distinct = list(dict.fromkeys(rows))
    # Only what runs the same way needs the same for that: the first backward differs from later ones, and from updates.
    running = [(place, held[place]) for place, held in distinct]
    kinds = np.array([(place, now.is_weights, now.is_step, now.gradients) for place, now in running])
    counts = np.array([[figure for moment in held for figure in moment] for _, held in distinct])
    alive = np.ones(len(distinct), dtype=bool)
    for index, (kind, own) in enumerate(zip(kinds, counts, strict=True)):
        covers = alive & (kinds == kind).all(axis=1) & (counts >= own).all(axis=1)
        covers[index] = False
        alive[index] = not covers.any()
    return [row for row, is_alive in zip(distinct, alive, strict=True) if is_alive]
