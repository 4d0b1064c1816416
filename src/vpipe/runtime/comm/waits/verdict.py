"""Who waits for whom, and whether that can ever end: decided from what was seen of all ranks, without asking anybody.

A rank *lacks* another one when what it waits for is certainly still to be begun by that. This is known where ranks
count alike: a meeting of all ranks that the other has not come to, or a program that it has not begun. Messages inside
of one program prove nothing, they may be on their way. A rank is *stuck* when it lacks one that is stuck itself, or
that has ended: among ranks that wait at the same moment that is for ever.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from vpipe.errors import ExecutionError
from vpipe.runtime.comm.waits.activity import CLOSED, EVERYTHING, LastCall, Place
from vpipe.runtime.comm.waits.sighting import Sighting, Verdict, name_place
from vpipe.words.near import plural

__all__ = ["describe_wait", "different_calls", "judge"]

_MOST_NAMED = 4
"""Ranks that one text speaks of, so that it can be read."""

_LATE_SECONDS = 5.0
"""How long after the end of a rank a message that it may have sent before is still thought to be on its way."""

_SAME_CALLS = (
    "every rank must make the same calls in the same order; Pipeline, step, train, evaluate and close are for all "
    "ranks, not for rank 0 alone"
)


class _End(NamedTuple):
    """Why a rank will never do what another one waits for, whatever it does now, and what to change."""

    text: str
    fix: str | None = _SAME_CALLS
    """None: the rank is lost, and its own words say what to change."""


_Lacked = Mapping[int, _End | None]
"""The ranks that one lacks; with a reason where that is for ever by itself."""


def judge(
    rank: int, seen: Mapping[int, Sighting], waiting: Collection[int], now: float | None = None
) -> Verdict | None:
    """Return why the wait of `rank` can never end; None: it may.

    `waiting` are those ranks that are known to have waited all at one moment.
    """
    now = time.time() if now is None else now
    stuck: dict[int, _Lacked] = {own: _lacked(seen[own], seen, now) for own in waiting if own in seen}
    while True:
        left: dict[int, _Lacked] = {
            own: {peer: end for peer, end in peers.items() if end is not None or stuck.get(peer)}
            for own, peers in stuck.items()
        }
        if left == stuck:
            break
        stuck = left
    stuck = {own: peers for own, peers in stuck.items() if peers}
    return _verdict(stuck, seen) if rank in stuck else None


def _lacked(own: Sighting, seen: Mapping[int, Sighting], now: float) -> _Lacked:
    found: dict[int, _End | None] = {}
    for peer in () if own.wait is None else own.wait.peers:
        if (other := seen.get(peer)) is not None:
            end = _end(own, other, now)
            if end is not None or _has_come(own, other) is False:
                found[peer] = end
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


def _end(own: Sighting, other: Sighting, now: float) -> _End | None:
    """Return why `other` will never do what `own` waits for; None: it may."""
    pipeline, has_come = own.place.pipeline, _has_come(own, other)
    if (elsewhere := _met_elsewhere(own, other)) is not None:
        return _End(f"rank {other.rank} is elsewhere: {elsewhere}")
    if has_come:
        return None
    if (why := other.ended.get(pipeline, other.ended.get(EVERYTHING))) is not None:
        if why == CLOSED:
            return _End(f"rank {other.rank} has closed its pipeline") if has_come is False else None
        is_late = now - other.place.since > _LATE_SECONDS
        return _End(f"rank {other.rank} stopped: {why}", None) if has_come is False or is_late else None
    if has_come is False and other.last is not None and _trained_fewer(own.place, other.last):
        done = plural(other.last.place.done or 0, "batch", "batches")
        return _End(f"rank {other.rank} has ended its train after {done}", "give every rank the same number of batches")
    return None


def _met_elsewhere(own: Sighting, other: Sighting) -> str | None:
    """Return for what else `other` met the others, or began a program, where `own` waits; None: that is not known."""
    assert own.wait is not None
    if own.wait.meeting is not None:
        mine, theirs = (
            next((item.key for item in seen.meetings if item.number == own.wait.meeting), None) for seen in (own, other)
        )
        return None if None in (mine, theirs) or mine == theirs else theirs
    begun, program = own.programs.get(own.place.pipeline), other.programs.get(own.place.pipeline)
    if begun is None or program is None or begun.number != program.number:
        return None
    return program.kind if begun.kind != program.kind else None


def _trained_fewer(place: Place, last: LastCall) -> bool:
    """Tell whether a call that has ended was the train in which another rank is, begun at the same iteration."""
    ended = last.place
    return (
        last.how == "ended"
        and (place.call, place.pipeline, place.began) == ("train", ended.pipeline, ended.began)
        and ended.call == "train"
        and (ended.done or 0) <= (place.done or 0)
    )


def _verdict(stuck: Mapping[int, _Lacked], seen: Mapping[int, Sighting]) -> Verdict:
    ends = list(dict.fromkeys(end for peers in stuck.values() for end in peers.values() if end is not None))
    named = sorted(stuck)[:_MOST_NAMED]
    parts = [f"rank {own} is {name_place(seen[own].place)}, and waits for {_awaited(seen[own])}" for own in named]
    if len(stuck) > len(named):
        parts.append(f"{len(stuck) - len(named)} more ranks wait like these")
    parts += [end.text for end in ends[:_MOST_NAMED]]
    is_loss = any(end.fix is None for end in ends)
    fix = "" if is_loss else f". Nobody can go on: {ends[0].fix if ends else _SAME_CALLS}"
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
