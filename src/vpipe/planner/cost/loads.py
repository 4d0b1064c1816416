"""What a schedule makes every stage hold at once, in microbatches and messages.

A schedule is replayed action by action, because not all is there at once: a stage holds a microbatch's activations from
its forward to its backward (when that is split, some of them until the weight half), and gradients from the first
backward to the update. What no other moment exceeds may be the peak.

A message that arrived is the activation that its microbatch begins with. What else there is of messages depends on how
they travel, and a little on chance: what may wait at worst, for a rank that is as far behind as the order of both
allows, is counted apart from what is to be expected.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.weights import weight_usage

__all__ = ["COUNTED", "SPARE_GRADIENTS", "SWAP_BUFFERS", "Moment", "Replay", "StageLoad", "stage_loads"]

SWAP_BUFFERS = 2
"""Microbatches of a block that swaps that are on the device at once: one in use, and one on its way out or back."""
SPARE_GRADIENTS = 2
"""Gradients that wait in shared memory, or are free there; more have memory only while they wait.

As many are on their way where no rank is behind: one that is read, and one that was sent meanwhile.
"""
COUNTED = frozenset({Kind.F, Kind.B, Kind.I, Kind.W, Kind.STEP})
"""Actions that change what is held."""

_BACKWARD = frozenset({Kind.B, Kind.I})
_USING = frozenset({Kind.F, Kind.B, Kind.I})
"""Actions that use the activations of a microbatch that is before its backward."""
_LEAST_BETWEEN = 2
"""Computations between a forward and its backward under which activations are not moved (`insert_offloads`)."""


class Moment(NamedTuple):
    """What one stage holds while it does something."""

    full: int
    """Microbatches that are before their backward."""
    halves: int
    """Microbatches between the halves of a split backward."""
    gradients: int
    """1 from the first backward to the update, else 0."""
    stale: int
    """Messages that arrived and are needed no more; they go back when the next one is waited for."""
    copies: int
    """Microbatches of a block that swaps that are on the device.

    One is in use, unless weights alone are worked on, and one is on its way out or back; besides, those whose backward
    comes so soon that they are not moved. Nothing is moved where no more than two are ever in flight.
    """
    waiting: int
    """Gradients that may have been sent and not read, at worst, besides `SPARE_GRADIENTS`."""
    is_weights: bool
    """Whether it computes a weight half, which needs nothing but what waits for it."""
    is_step: bool
    """Whether it updates its weights: then nothing is computed."""


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
    sockets: bool = False
    """Whether messages travel through sockets."""

    @property
    def full(self) -> int:
        """Most microbatches in flight."""
        return max(moment.full for moment in self.moments)

    @property
    def keeps_versions(self) -> bool:
        """Tell whether an update leaves the weights before it for those microbatches."""
        return self.num_versions > 1


def stage_loads(schedule: Schedule, *, sockets: bool = False) -> tuple[StageLoad, ...]:
    """Replay each stage's order: what it holds at its peaks.

    `sockets` says that messages do not travel in memory that both ranks see.

    Raises:
        ScheduleError: a forward or an update is missing.
    """
    usage = weight_usage(schedule)
    loads = [
        StageLoad(_largest(_moments(schedule, stage, sockets)), usage[stage].num_on_device, sockets=sockets)
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

    In shared memory what was sent waits there until it is read. A stage gets ahead of the next one by as much as it is
    deeper, and one more is read meanwhile; the memory stays for the next ones. At worst, while the pipeline fills, all
    that are in flight wait. With the gradients a stage gets ahead of the one before by as much as that is deeper; where
    both are equally deep, as in GPipe, there is nothing that would hold it back, and those that are spare have memory
    from the last batch. More of them (`Moment.waiting`) have memory while they wait and no longer. Through sockets two
    messages are awaited from either side, and what was sent is kept until an answer shows that it was received. The
    gradient that a backward begins with counts as what it needs for a moment.
    """
    rank, last = schedule.position_of(stage), schedule.num_stages - 1
    crosses_before = stage > 0 and schedule.position_of(stage - 1) != rank
    crosses_after = stage < last and schedule.position_of(stage + 1) != rank
    if sockets:
        arriving = most_arriving = 3 + max(most)
        leaving = most_leaving = 3 + most[stage]
    else:
        behind = max(0, most[stage - 1] - most[stage]) if crosses_before else 0
        deeper = max(0, most[stage] - most[stage + 1]) if crosses_after else 0
        arriving = min(most[stage], behind or (SPARE_GRADIENTS if schedule.synchronous else 1))
        leaving, most_leaving = 1 + deeper, 1 + most[stage]
        most_arriving = max(arriving, SPARE_GRADIENTS)
    before, after = (arriving, most_arriving), (leaving, most_leaving)
    # Between stages of one rank values are handed over, one at a time.
    handed_over = int(stage < last)
    before = before if crosses_before else (0, 0)
    after = after if crosses_after else (handed_over, handed_over)
    return _MessageCounts(before[0], after[0], before[1], after[1])


class Replay:
    """Counts what one stage holds while its rank goes through its order."""

    def __init__(self, schedule: Schedule, stage: int, *, sockets: bool = False) -> None:
        self._crosses = stage > 0 and schedule.position_of(stage - 1) != schedule.position_of(stage)
        order = [action for action in schedule.stage_order(stage) if action.kind in COUNTED]
        self._is_moved = _most_in_flight(order) > SWAP_BUFFERS
        self._short = _short(order)
        self._taken = _taken_before(schedule, stage - 1) if self._crosses and not sockets else None
        self._sent = self._read = 0
        self._full = self._halves = self._gradients = self._stale = self._staying = 0
        self.is_moving = False
        """Whether one of the copies that were counted last is on its way."""

    def begin(self, action: Action) -> Moment:
        """Return what is held while an action runs: after a forward, and before all else."""
        if action.kind is Kind.F:
            self._full, self._stale = self._full + 1, 0
            self._staying += action.microbatch in self._short
            if self._taken is not None:
                # That the one before has done this forward shows which gradients it had read by then.
                self._read = max(self._read, self._taken[action.microbatch])
        if action.kind in _USING:
            return self._moment(1 + self._staying - (action.microbatch in self._short))
        return self._moment(self._staying, action.kind)

    def end(self, action: Action) -> None:
        """Go on to where the action is over."""
        if action.kind in _BACKWARD:
            self._full, self._gradients, self._stale = self._full - 1, 1, self._stale + self._crosses
            self._halves += action.kind is Kind.I
            self._staying -= action.microbatch in self._short
            self._sent += 1
        elif action.kind is Kind.W:
            self._halves -= 1
        elif action.kind is Kind.STEP:
            self._gradients = 0

    def rest(self) -> Moment:
        """Return what is held while the rank does something for another stage."""
        return self._moment(self._staying)

    def _moment(self, staying: int, kind: Kind | None = None) -> Moment:
        """Count; of a block that swaps, the microbatches `staying` are on the device, and one on its way."""
        full, waiting = self._full, self._sent - self._read - SPARE_GRADIENTS
        self.is_moving = self._is_moved and full > staying
        copies = staying + SWAP_BUFFERS - 1 if self.is_moving else full
        if self._taken is None or waiting < 0:
            waiting = 0
        is_weights, is_step = kind is Kind.W, kind is Kind.STEP
        return Moment(full, self._halves, self._gradients, self._stale, copies, waiting, is_weights, is_step)


def _most_in_flight(order: Iterable[Action]) -> int:
    return max(accumulate((action.kind is Kind.F) - (action.kind in _BACKWARD) for action in order))


def _short(order: Sequence[Action]) -> frozenset[int]:
    """Return the microbatches whose backward comes so soon after their forward that they are not moved."""
    forwards = {action.microbatch: place for place, action in enumerate(order) if action.kind is Kind.F}
    return frozenset(
        action.microbatch
        for place, action in enumerate(order)
        if action.kind in _BACKWARD and place - forwards[action.microbatch] - 1 < _LEAST_BETWEEN
    )


def _taken_before(schedule: Schedule, stage: int) -> Mapping[int, int]:
    """Return how many gradients a stage has read before each of its forwards."""
    taken, count = {}, 0
    for action in schedule.stage_order(stage):
        if action.kind is Kind.F:
            taken[action.microbatch] = count
        count += action.kind in _BACKWARD
    return taken


def _moments(schedule: Schedule, stage: int, sockets: bool) -> Iterator[Moment]:
    replay = Replay(schedule, stage, sockets=sockets)
    for action in schedule.stage_order(stage):
        if action.kind in COUNTED:
            yield replay.begin(action)
            replay.end(action)


_Figures = Callable[[Moment], tuple[int, int]]
_ORDERS: tuple[_Figures, ...] = (
    # What a microbatch in flight holds is at least a message, as its input is, so it makes up for a message. But where
    # the first block swaps, messages that are needed no more are gone; and it may hold next to nothing.
    lambda moment: (moment.full, moment.full + moment.stale + moment.waiting),
    lambda moment: (moment.full, moment.full + moment.waiting),
    lambda moment: (moment.waiting, moment.full + moment.waiting),
)


def _largest(moments: Iterable[Moment]) -> tuple[Moment, ...]:
    """Return those that no other ones cover, whatever a microbatch holds."""
    groups: defaultdict[object, set[Moment]] = defaultdict(set)
    for moment in set(moments):
        groups[moment._replace(full=0, stale=0, waiting=0)].add(moment)
    found: set[Moment] = set()
    for figures in _ORDERS:
        front = {one for group in groups.values() for one in _front(group, figures)}
        found |= {one for one in front if not any(_covers(other, one, figures) for other in front if other != one)}
    return tuple(sorted(found))


def _front(moments: Iterable[Moment], figures: _Figures) -> list[Moment]:
    """Return the moments at which a sum of both figures, in any proportion, may be largest: corners of their hull."""
    front: list[Moment] = []
    for moment in sorted(moments, key=figures, reverse=True):
        first, second = figures(moment)
        if front and second <= figures(front[-1])[1]:
            continue
        while len(front) > 1:
            (before, less), (last, more) = figures(front[-2]), figures(front[-1])
            if (before - last) * (second - more) < (last - first) * (more - less):
                break
            front.pop()
        front.append(moment)
    return front


def _covers(large: Moment, small: Moment, figures: _Figures) -> bool:
    # The backward that makes the gradients needs something else for a moment than one that adds to them.
    (first, second), (other_first, other_second) = figures(large), figures(small)
    return (
        (large.is_weights, large.is_step, large.gradients) == (small.is_weights, small.is_step, small.gradients)
        and first >= other_first
        and second >= other_second
        and large.halves >= small.halves
        and large.copies >= small.copies
    )
