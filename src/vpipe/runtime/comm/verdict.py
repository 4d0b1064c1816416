"""Who waits for whom, and whether that can ever end: decided from what was seen of all ranks, without asking anybody.

A rank *lacks* another one when what it waits for is certainly still to be begun by that. This is known where ranks
count alike: a meeting of all ranks that the other has not come to, or a program that it has not begun. Messages inside
of one program prove nothing, they may be on their way. A rank is *stuck* when it lacks one that is stuck itself, or
that has ended: among ranks that wait at the same moment that is for ever.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

from vpipe.errors import ExecutionError
from vpipe.runtime.comm.activity import CLOSED, EVERYTHING
from vpipe.runtime.comm.sighting import Sighting, Verdict, name_place

__all__ = ["describe_wait", "different_calls", "judge"]

_MOST_NAMED = 4
"""Ranks that one text speaks of, so that it can be read."""

_LATE_SECONDS = 5.0
"""How long after the end of a rank a message that it may have sent before is still thought to be on its way."""

_STOPPED = "rank {} stopped: "
_SAME_BATCHES = "give every rank the same number of batches"
_SAME_CALLS = (
    "every rank must make the same calls in the same order; Pipeline, step, train, evaluate and close are for all "
    "ranks, not for rank 0 alone"
)


def judge(
    rank: int, seen: Mapping[int, Sighting], waiting: Collection[int], now: float | None = None
) -> Verdict | None:
    """Return why the wait of `rank` can never end; None: it may.

    `waiting` are those ranks that are known to have waited all at one moment.
    """
    now = time.time() if now is None else now
    lacking = {own: _lacking(seen[own], seen, now) for own in waiting if own in seen}
    stuck = dict(lacking)
    while True:
        left = {
            own: {peer: why for peer, why in peers.items() if why is not None or peer in stuck}
            for own, peers in stuck.items()
        }
        left = {own: peers for own, peers in left.items() if peers}
        if left == stuck:
            break
        stuck = left
    if rank in stuck:
        return _verdict(stuck, seen)
    return None


def _lacking(own: Sighting, seen: Mapping[int, Sighting], now: float) -> dict[int, str | None]:
    """Return the ranks that `own` lacks; with a reason where that is for ever, whatever they are doing."""
    found: dict[int, str | None] = {}
    if own.wait is None:
        return found
    for peer in own.wait.peers:
        other = seen.get(peer)
        if other is None or other.rank == own.rank:
            continue
        has_come, end = _has_come(own, other), _ending(own, other, now)
        if end is not None:
            found[peer] = end
        elif has_come is False:
            found[peer] = None
    return found


def _has_come(own: Sighting, other: Sighting) -> bool | None:
    """Tell whether `other` has got to where `own` waits; None: that is not known."""
    assert own.wait is not None
    if own.wait.meeting is not None:
        return other.num_meetings >= own.wait.meeting
    count = own.num_programs(own.place.pipeline)
    if not count or own.place.pipeline < 0:
        return None
    return None if other.num_programs(own.place.pipeline) >= count else False


def _ending(own: Sighting, other: Sighting, now: float) -> str | None:
    """Return why `other` will never do what `own` waits for, whatever it does now."""
    assert own.wait is not None
    place, has_come = own.place, _has_come(own, other)
    if own.wait.meeting is not None:
        mine = next((item.key for item in own.meetings if item.number == own.wait.meeting), None)
        theirs = next((item.key for item in other.meetings if item.number == own.wait.meeting), None)
        if mine is not None and theirs is not None and mine != theirs:
            return f"rank {other.rank} has met the others for something else there ({theirs.partition(': ')[2]})"
        if has_come:
            return None
    else:
        own_program, program = own.programs.get(place.pipeline), other.programs.get(place.pipeline)
        if own_program is not None and program is not None:
            is_same = own_program.number == program.number
            if is_same and own_program.kind != program.kind:
                return f"rank {other.rank} is in its {program.kind} there"
    if (why := other.ended.get(place.pipeline, other.ended.get(EVERYTHING))) is not None:
        is_late = now - other.place.since > _LATE_SECONDS
        if why == CLOSED:
            return f"rank {other.rank} has closed its pipeline" if has_come is False else None
        return f"{_STOPPED.format(other.rank)}{why}" if has_come is False or is_late else None
    if has_come is False and _trained_fewer(own, other):
        assert other.last is not None
        done = other.last.place.done
        return f"rank {other.rank} has ended its train after {done} {'batch' if done == 1 else 'batches'}"
    return None


def _trained_fewer(own: Sighting, other: Sighting) -> bool:
    """Tell whether `other` has got to the end of the train in which `own` is, which it began at the same iteration."""
    if other.last is None or own.place.call != "train" or own.place.done is None:
        return False
    ended = other.last.place
    return (
        other.last.how == "ended"
        and (ended.call, ended.pipeline, ended.began) == ("train", own.place.pipeline, own.place.began)
        and ended.done is not None
        and ended.done <= own.place.done
    )


def _verdict(stuck: Mapping[int, Mapping[int, str | None]], seen: Mapping[int, Sighting]) -> Verdict:
    reasons = dict.fromkeys(why for peers in stuck.values() for why in peers.values() if why is not None)
    is_loss = any(
        why.startswith(_STOPPED.format(peer)) for peers in stuck.values() for peer, why in peers.items() if why
    )
    named = sorted(stuck)[:_MOST_NAMED]
    parts = [f"rank {own} is {name_place(seen[own].place)}, and waits for {_awaited(seen[own])}" for own in named]
    if len(stuck) > len(named):
        parts.append(f"{len(stuck) - len(named)} more ranks wait like these")
    parts += list(reasons)[:_MOST_NAMED]
    fewer = any("has ended its train" in why for why in reasons)
    fix = "" if is_loss else f". Nobody can go on: {_SAME_BATCHES if fewer else _SAME_CALLS}"
    return Verdict("; ".join(parts) + fix, tuple(sorted(stuck)), is_loss)


def different_calls(told: Sequence[str]) -> ExecutionError:
    """Return the error for ranks that met for different things; `told` says of each where it is, and what for."""
    first = next(rank for rank, text in enumerate(told) if text != told[0])
    return ExecutionError(f"rank 0 is {told[0]}; rank {first} is {told[first]}. Nobody can go on: {_SAME_CALLS}")


def _awaited(own: Sighting) -> str:
    assert own.wait is not None
    if own.wait.meeting is None:
        return f"{own.wait.what} {'by' if own.wait.what.startswith('the taking') else 'from'} {_ranks(own.wait.peers)}"
    return own.wait.what


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def describe_wait(own: Sighting, seen: Mapping[int, Sighting]) -> str:
    """Say for how long `own` has waited for what, and what the ranks do that it waits for, and those that these do."""
    assert own.wait is not None
    head = f"{name_place(own.place)}, waiting for {time.time() - own.wait.since:.0f} s for {_awaited(own)}"
    lines: list[str] = []
    todo, told = [own], {own.rank}
    while todo and len(lines) < _MOST_NAMED:
        waiter = todo.pop(0)
        for peer in _behind(waiter, seen):
            if peer in told or len(lines) == _MOST_NAMED:
                continue
            told.add(peer)
            if (other := seen.get(peer)) is None:
                lines.append(f"rank {peer} has not been heard of")
                continue
            lines.append(f"rank {peer} {_not_called(waiter, other)}is {other.describe()}")
            if other.wait is not None:
                todo.append(other)
    return f"{head}: {'; '.join(lines)}" if lines else head


def _behind(own: Sighting, seen: Mapping[int, Sighting]) -> list[int]:
    """Return the ranks that `own` waits for, without those that are known to have come."""
    assert own.wait is not None
    return [peer for peer in own.wait.peers if (other := seen.get(peer)) is None or _has_come(own, other) is not True]


def _not_called(own: Sighting, other: Sighting) -> str:
    call = own.place.call
    if _has_come(own, other) is not False or not call or other.place.call == call:
        return ""
    missed = {"close": "has not closed", "Pipeline": "has not made its Pipeline"}
    return f"{missed.get(call, f'has not called {call}')}; it "
