"""Add the communication: what a rank receives before, and sends after, each of its computations.

A value crosses between stages s and s + 1 only when they are on different ranks. `RECV_F` stands right before its `F`,
`SEND_F` right after it; `RECV_B` right before the `B` or `I` that needs it, `SEND_B` right after. A transport may post
receives earlier than the list says; it must not wait for them earlier.
"""

from __future__ import annotations

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.schedule import Schedule

__all__ = ["counterpart", "lower"]

_COUNTERPARTS = {
    Kind.SEND_F: (Kind.RECV_F, 1),
    Kind.RECV_F: (Kind.SEND_F, -1),
    Kind.SEND_B: (Kind.RECV_B, -1),
    Kind.RECV_B: (Kind.SEND_B, 1),
}


def counterpart(action: Action) -> Action:
    """Return the receive that a send answers, or the send that a receive waits for: ``0SEND_F3`` and ``1RECV_F3``."""
    kind, offset = _COUNTERPARTS[action.kind]
    return Action(action.stage + offset, kind, action.microbatch)


def lower(schedule: Schedule) -> tuple[tuple[Action, ...], ...]:
    """Return each rank's compute actions with the sends and receives they need."""
    last = schedule.num_stages - 1
    ranks = [schedule.position_of(stage) for stage in range(schedule.num_stages)]
    crosses_before = [stage > 0 and ranks[stage - 1] != ranks[stage] for stage in range(last + 1)]
    crosses_after = [stage < last and ranks[stage + 1] != ranks[stage] for stage in range(last + 1)]
    return tuple(tuple(_lower_rank(order, crosses_before, crosses_after)) for order in schedule.orders)


def _lower_rank(order: tuple[Action, ...], crosses_before: list[bool], crosses_after: list[bool]) -> list[Action]:
    lowered: list[Action] = []
    for action in order:
        stage, microbatch = action.stage, action.microbatch
        before, after = crosses_before[stage], crosses_after[stage]
        if action.kind is Kind.F:
            if before:
                lowered.append(Action(stage, Kind.RECV_F, microbatch))
            lowered.append(action)
            if after:
                lowered.append(Action(stage, Kind.SEND_F, microbatch))
        elif action.kind in (Kind.B, Kind.I):
            if after:
                lowered.append(Action(stage, Kind.RECV_B, microbatch))
            lowered.append(action)
            if before:
                lowered.append(Action(stage, Kind.SEND_B, microbatch))
        else:
            lowered.append(action)
    return lowered
