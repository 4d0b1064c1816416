"""What is only in the CSV of `torch.distributed.pipelining`: sends and receives, shards and replicas, another order.

Torch writes a schedule as its computations (`compute_only`), or with everything that its runtime does besides
(`compute_comms`). Of that a `Schedule` keeps the computations alone: `lower` makes the communication again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from vpipe.errors import ScheduleError
from vpipe.schedule.action import COMMUNICATION, Action, Kind
from vpipe.schedule.passes.lower import lower
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule, freeze

__all__ = ["IN_ORDER", "check_communication", "in_microbatch_order", "is_for_shards", "without_communication"]

_FOR_SHARDS = re.compile(r"\d+(UNSHARD|RESHARD|REDUCE_GRAD)\d*")
_BACKWARD = (Kind.B, Kind.I, Kind.W)
_USERS = {
    Kind.SEND_F: (Kind.F,),
    Kind.RECV_F: (Kind.F,),
    Kind.SEND_B: (Kind.B, Kind.I),
    Kind.RECV_B: (Kind.B, Kind.I),
}
_RECEIVES = (Kind.RECV_F, Kind.RECV_B)

IN_ORDER = (
    "backwards were put into microbatch order, in which every schedule sums gradients; the file has them in another "
    "one, as torch's looped BFS does, which takes the same time"
)
"""What is said of a schedule that `in_microbatch_order` has changed."""


def is_for_shards(word: str) -> bool:
    """Tell whether a cell is for sharded weights or replicas: there are none that it could gather or sum."""
    return _FOR_SHARDS.fullmatch(word) is not None


def without_communication(orders: Sequence[Sequence[Action]]) -> list[list[Action]]:
    """Return orders without sends and receives."""
    return [[action for action in order if action.kind not in COMMUNICATION] for order in orders]


def check_communication(orders: Sequence[Sequence[Action]], placement: Placement, num_microbatches: int) -> None:
    """Check that the sends and receives in `orders`, if there are any, are those that the computations need.

    Raises:
        ScheduleError: one is missing, or needed by none, or on the wrong side of its computation; the text names it.
    """
    if not any(action.kind in COMMUNICATION for order in orders for action in order):
        return
    bare = Schedule("csv", num_microbatches, placement, freeze(without_communication(orders)))
    for rank, (given, needed) in enumerate(zip(orders, lower(bare), strict=True)):
        found, wanted = (
            Counter(action for action in order if action.kind in COMMUNICATION) for order in (given, needed)
        )
        if missing := list(wanted - found):
            raise ScheduleError(
                f"rank {rank} has sends or receives, but not {_named(missing)}, which its computations need; leave all "
                "of them out, they are made from the computations"
            )
        if odd := list(found - wanted):
            raise ScheduleError(
                f"rank {rank} has {_named(odd)}, which its computations do not need; a value crosses once between "
                "stages on different ranks. Leave sends and receives out, they are made from the computations"
            )
        places = {action: place for place, action in enumerate(given)}
        for action in found:
            users = (Action(action.stage, kind, action.microbatch) for kind in _USERS[action.kind])
            user = next(each for each in users if each in places)
            if (places[action] < places[user]) != (action.kind in _RECEIVES):
                side = "behind" if action.kind in _RECEIVES else "before"
                raise ScheduleError(f"rank {rank} has {action} {side} {user}; put it on the other side")


def _named(actions: Iterable[Action]) -> str:
    names = [str(action) for action in actions]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def in_microbatch_order(orders: Sequence[Sequence[Action]]) -> list[list[Action]]:
    """Return orders in which the first backward of each stage is that of microbatch 0, the second of 1, and so on.

    The time that a backward takes does not depend on its microbatch, so whatever is legal before and after is as fast.
    """
    renamed = []
    for order in orders:
        places: Counter[int] = Counter()
        position: dict[tuple[int, int], int] = {}
        for action in order:
            if action.kind in (Kind.B, Kind.I):
                position[action.stage, action.microbatch] = places[action.stage]
                places[action.stage] += 1
        renamed.append([_renamed(action, position) if action.kind in _BACKWARD else action for action in order])
    return renamed


def _renamed(action: Action, position: dict[tuple[int, int], int]) -> Action:
    return Action(action.stage, action.kind, position.get((action.stage, action.microbatch), action.microbatch))
