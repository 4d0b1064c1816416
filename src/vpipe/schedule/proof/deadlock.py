"""Prove that ranks which run their lowered lists in order neither wait for each other forever nor mix up messages.

Two transports, two rules; a schedule must satisfy both:

- messages matched by tag (gloo): a send never blocks, a receive waits for the message with its stage and microbatch.
  Then one replay decides: either every rank reaches its end, or the ranks that cannot wait in a circle.
- messages matched by order (NCCL): on each directed link, with a communicator for each direction of flow (activations,
  gradients), the n-th receive gets the n-th send, so both sides must list the same messages in the same order.
"""

from __future__ import annotations

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.passes.lower import counterpart, lower
from vpipe.schedule.problem import Violation
from vpipe.schedule.schedule import Schedule

__all__ = ["find_deadlock", "find_disorder"]

_SENDS = (Kind.SEND_F, Kind.SEND_B)
_RECEIVES = (Kind.RECV_F, Kind.RECV_B)
_CHANNEL = tuple[int, int, str]


def find_deadlock(schedule: Schedule) -> list[Violation]:
    """Return the circle of waiting ranks, if messages matched by tag can end in one."""
    stuck = _replay(lower(schedule))
    if not stuck:
        return []
    senders = {rank: schedule.rank_of(counterpart(receive)) for rank, receive in stuck.items()}
    path: list[int] = []
    rank = min(stuck)
    while rank in stuck and rank not in path:
        path.append(rank)
        rank = senders[rank]
    circle = path[path.index(rank) :] if rank in path else path
    waits = []
    for rank in circle:
        receive = stuck[rank]
        waits.append(f"rank {rank} waits at {receive} for {counterpart(receive)} of rank {senders[rank]}")
    return [
        Violation(
            f"deadlock: {'; '.join(waits)}", tuple((rank, _needing(schedule, rank, stuck[rank])) for rank in circle)
        )
    ]


def find_disorder(schedule: Schedule) -> list[Violation]:
    """Return, for each directed link, the first message that sender and receiver list at different places."""
    sent: dict[_CHANNEL, list[Action]] = {}
    received: dict[_CHANNEL, list[Action]] = {}
    for rank, order in enumerate(lower(schedule)):
        for action in order:
            if action.kind in _SENDS:
                receive = counterpart(action)
                channel = (rank, schedule.rank_of(receive), action.kind.value[-1])
                sent.setdefault(channel, []).append(receive)
            elif action.kind in _RECEIVES:
                channel = (schedule.rank_of(counterpart(action)), rank, action.kind.value[-1])
                received.setdefault(channel, []).append(action)
    problems = []
    for channel in sorted(sent.keys() & received.keys()):
        for number, (message, expected) in enumerate(zip(sent[channel], received[channel], strict=False)):
            if message != expected:
                problems.append(_disorder(schedule, channel, number, message, expected))
                break
    return problems


def _disorder(schedule: Schedule, channel: _CHANNEL, number: int, message: Action, expected: Action) -> Violation:
    source, target, _ = channel
    reason = (
        f"link from rank {source} to rank {target}: message {number} is {counterpart(message)} where it is sent but "
        f"{expected} where it is received; a transport that matches by order (NCCL) would mix them up: run both ranks' "
        "actions in the same microbatch order"
    )
    return Violation(reason, ((target, _needing(schedule, target, expected)),))


def _replay(lowered: tuple[tuple[Action, ...], ...]) -> dict[int, Action]:
    """Run all ranks as far as they get; return the receive at which each rank is stuck."""
    positions = [0] * len(lowered)
    arrived: set[Action] = set()  # the receives whose message was sent
    waiting: dict[Action, int] = {}
    runnable = list(range(len(lowered)))
    while runnable:
        rank = runnable.pop()
        order, position = lowered[rank], positions[rank]
        while position < len(order):
            action = order[position]
            if action.kind in _RECEIVES and action not in arrived:
                waiting[action] = rank
                break
            if action.kind in _SENDS:
                receive = counterpart(action)
                arrived.add(receive)
                if receive in waiting:
                    runnable.append(waiting.pop(receive))
            position += 1
        positions[rank] = position
    return {rank: receive for receive, rank in waiting.items()}


def _needing(schedule: Schedule, rank: int, receive: Action) -> int:
    """Return the place of the computation that `receive` stands in front of."""
    kinds = (Kind.F,) if receive.kind is Kind.RECV_F else (Kind.B, Kind.I)
    wanted = [Action(receive.stage, kind, receive.microbatch) for kind in kinds]
    return next(index for index, action in enumerate(schedule.orders[rank]) if action in wanted)
