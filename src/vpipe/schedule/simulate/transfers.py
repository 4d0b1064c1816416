"""When messages are on their links: recovered from a simulation, one sender at a time."""

from __future__ import annotations

from typing import NamedTuple

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.simulate.simulate import Simulation

__all__ = ["Transfer", "transfers_of"]

_SENDS = {Kind.F: (Kind.SEND_F, 1), Kind.B: (Kind.SEND_B, -1), Kind.I: (Kind.SEND_B, -1)}


class Transfer(NamedTuple):
    """One message: on its link from `start` to `end`, there at `arrival`."""

    action: Action
    """`SEND_F` or `SEND_B`."""
    receiver: int
    producer: int
    """The place, among its rank's events, of the computation that made it."""
    start: float
    end: float
    arrival: float


def transfers_of(simulation: Simulation, sender: int) -> list[Transfer]:
    """Return the messages of rank `sender`, in the order in which they are made."""
    schedule = simulation.schedule
    ahead, back = simulation.hops
    link_free: dict[int, float] = {}
    transfers = []
    for producer, (action, _, done) in enumerate(simulation.events[sender]):
        if action.kind not in _SENDS:
            continue
        kind, step = _SENDS[action.kind]
        target = action.stage + step
        if (
            not 0 <= target < schedule.num_stages
            or (receiver := schedule.rank_of(Action(target, action.kind, action.microbatch))) == sender
        ):
            continue
        hop = ahead[action.stage] if step > 0 else back[target]
        start = done
        if hop.occupied:
            start = max(done, link_free.get(receiver, 0.0))
            link_free[receiver] = start + hop.occupied
        end = start + hop.occupied
        send = Action(action.stage, kind, action.microbatch)
        transfers.append(Transfer(send, receiver, producer, start, end, end + hop.latency))
    return transfers
