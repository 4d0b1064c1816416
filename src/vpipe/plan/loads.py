"""What a schedule makes every stage hold at once, in microbatches and messages.

A schedule is replayed action by action, because not all is there at once: a stage holds a microbatch's activations from
its forward to its backward (when that is split, some of them until the weight half), and gradients from the first
backward to the update. What no other moment exceeds may be the peak.

A message that arrived is the activation that its microbatch begins with. What else there is of messages depends on how
they travel, and a little on chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from vpipe.schedule.action import Kind
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.weights import weight_usage

__all__ = ["COUNTED", "SWAP_BUFFERS", "Moment", "Replay", "StageLoad", "stage_loads"]

SWAP_BUFFERS = 2
"""Microbatches of a block that swaps that are on the device at once: one in use, and one on its way out or back."""
COUNTED = frozenset({Kind.F, Kind.B, Kind.I, Kind.W, Kind.STEP})
"""Actions that change what is held."""


class Moment(NamedTuple):
    """What one stage holds while it does something."""

    full: int
    """Microbatches that are before their backward."""
    halves: int
    """Microbatches between the halves of a split backward."""
    gradients: int
    """1 from the first backward to the update, else 0."""
    stale: int
    """1 where a message that arrived is needed no more, and goes back when the next one is waited for, else 0.

    There may be more, but then each came in exchange for at least as many bytes of activations.
    """
    is_step: bool
    """Whether it updates its weights: then nothing is computed."""

    @property
    def copies(self) -> int:
        """Microbatches of a block that swaps that are on the device; at an update none is needed."""
        return min(self.full, SWAP_BUFFERS - self.is_step)


@dataclass(frozen=True)
class StageLoad:
    """What a schedule makes one stage hold at once."""

    moments: tuple[Moment, ...]
    """Every one that may be the peak."""
    num_versions: int
    """Parameter sets on the device."""
    arriving: int = 0
    """Messages of the cut in front of the stage, besides the stale ones and those that are activations."""
    leaving: int = 0
    """Messages of the cut behind it."""
    most_arriving: int = 0
    """The same when neighbours are as far behind as they can be."""
    most_leaving: int = 0

    @property
    def full(self) -> int:
        """Most microbatches in flight."""
        return max(moment.full for moment in self.moments)


def stage_loads(schedule: Schedule, *, sockets: bool = False) -> tuple[StageLoad, ...]:
    """Replay each stage's order: what it holds at its peaks.

    `sockets` says that messages do not travel in memory that both ranks see.

    Raises:
        ScheduleError: a forward or an update is missing.
    """
    usage = weight_usage(schedule)
    loads = [
        StageLoad(_largest(_moments(schedule, stage)), usage[stage].num_on_device)
        for stage in range(schedule.num_stages)
    ]
    most = [load.full for load in loads]
    return tuple(
        replace(load, **_message_counts(schedule, stage, most, sockets=sockets)._asdict())
        for stage, load in enumerate(loads)
    )


class _MessageCounts(NamedTuple):
    """Messages in memory, besides those that are activations or stale: as is to be expected, and at most."""

    arriving: int
    leaving: int
    most_arriving: int
    most_leaving: int


def _message_counts(schedule: Schedule, stage: int, most: Sequence[int], *, sockets: bool) -> _MessageCounts:
    """Count messages by how many microbatches each stage has in flight at most.

    In shared memory what was sent waits there until it is read, and stays for the next one. A stage gets ahead of the
    next one by as much as it is deeper, and one more is read meanwhile; with the gradients it gets ahead of the one
    before by as much as that is deeper. Where both are equally deep, as in GPipe, those of a whole batch may wait. No
    more can than are in flight on the stage that sends an activation or waits for a gradient. Through sockets two
    messages are awaited from either side, and what was sent is kept until an answer shows that it was received. The
    gradient that a backward begins with counts as what it needs for a moment.
    """
    rank, last = schedule.rank_of(stage), schedule.num_stages - 1
    crosses_before = stage > 0 and schedule.rank_of(stage - 1) != rank
    crosses_after = stage < last and schedule.rank_of(stage + 1) != rank
    if sockets:
        arriving = most_arriving = 3 + max(most)
        leaving = most_leaving = 3 + most[stage]
    else:
        behind = max(0, most[stage - 1] - most[stage]) if crosses_before else 0
        deeper = max(0, most[stage] - most[stage + 1]) if crosses_after else 0
        arriving = min(most[stage], behind or (most[stage] if schedule.synchronous else 1))
        leaving, most_leaving = 1 + deeper, 1 + most[stage]
        most_arriving = 1 + most[stage - 1] if crosses_before else 0
    before, after = (arriving, most_arriving), (leaving, most_leaving)
    # Between stages of one rank values are handed over, one at a time.
    handed_over = int(stage < last)
    before = before if crosses_before else (0, 0)
    after = after if crosses_after else (handed_over, handed_over)
    return _MessageCounts(before[0], after[0], before[1], after[1])


class Replay:
    """Counts what one stage holds while its rank goes through its order."""

    def __init__(self, schedule: Schedule, stage: int) -> None:
        self._crosses = stage > 0 and schedule.rank_of(stage - 1) != schedule.rank_of(stage)
        self._full = self._halves = self._gradients = self._stale = 0

    def begin(self, kind: Kind) -> Moment:
        """Return what is held while an action runs: after a forward, and before all else."""
        if kind is Kind.F:
            self._full, self._stale = self._full + 1, 0
        return Moment(self._full, self._halves, self._gradients, self._stale, kind is Kind.STEP)

    def end(self, kind: Kind) -> Moment:
        """Return what is held when the action is over."""
        if kind in (Kind.B, Kind.I):
            self._full, self._gradients, self._stale = self._full - 1, 1, int(self._crosses)
            self._halves += kind is Kind.I
        elif kind is Kind.W:
            self._halves -= 1
        elif kind is Kind.STEP:
            self._gradients = 0
        return Moment(self._full, self._halves, self._gradients, self._stale, is_step=False)


def _moments(schedule: Schedule, stage: int) -> Iterator[Moment]:
    replay = Replay(schedule, stage)
    for action in schedule.stage_order(stage):
        if action.kind in COUNTED:
            yield replay.begin(action.kind)
            replay.end(action.kind)


def _largest(moments: Iterable[Moment]) -> tuple[Moment, ...]:
    """Return those that no other one covers."""
    seen = set(moments)
    return tuple(sorted(one for one in seen if not any(one != other and _covers(other, one) for other in seen)))


def _covers(large: Moment, small: Moment) -> bool:
    # The backward that makes the gradients needs something else for a moment than one that adds to them.
    same = large.is_step == small.is_step and large.gradients == small.gradients
    return same and large.full >= small.full and large.halves >= small.halves and large.stale >= small.stale
