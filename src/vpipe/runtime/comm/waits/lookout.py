"""A thread that looks after long waits: it tells others what this rank does, and says why it waits.

Where a wait can never end it ends it, on every rank that takes part. While ranks get on, nothing is told and nothing
is read: what a rank has done since the last look, a second ago, is no news.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from threading import Event, Thread

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from vpipe.errors import ExecutionError, PeerLostError, VPipeError
from vpipe.runtime.comm.waits.activity import Activity, Wait
from vpipe.runtime.comm.waits.sighting import Sighting, Verdict
from vpipe.runtime.comm.waits.verdict import describe_wait, judge

__all__ = ["Lookout", "look_out"]

_LOOK_SECONDS = 1.0
"""The time between two looks."""

_LONG_SECONDS = 2.0
"""A wait that lasts so long is looked into."""

_FIRST_WORD_SECONDS = 6.0
"""A wait that lasts so long is told; the next one like it, or the same again, when it lasts several times as long."""
_NEXT_WORD_FACTOR = 8

_STOPPING_SECONDS = 2.0
_CLOSING_TAG = (1 << 30) + 1
"""Nobody sends with it."""

logger = logging.getLogger(__name__)


def look_out(activity: Activity, store: Store, world: Sequence[int], *, is_shared: bool = False) -> Lookout | None:
    """Look after the waits of a rank of `world`, these processes; None where there is nobody else.

    A store that is shared with other worlds of the same processes, which are made by all of them in the same order, is
    used in turn.
    """
    if not activity.others:
        return None
    board = PrefixStore(f"vpipe/activity of {sorted(world)}", store)
    if is_shared:
        board = PrefixStore(str(board.add(f"turns of {activity.rank}", 1)), board)
    return Lookout(activity, board)


class Lookout:
    """Looks after the waits of one rank; its thread begins at once and ends with `stop`.

    `store` is one that all ranks see, for this world alone.
    """

    def __init__(self, activity: Activity, store: Store) -> None:
        self._activity = activity
        self._store: Store | None = store
        self._tick = 0
        self._before: Sighting | None = None
        self._told: Sighting | None = None
        self._seen: tuple[Wait | None, dict[int, Sighting]] = None, {}
        """What was seen of others at the last look, during which wait."""
        self._verdict: Verdict | None = None
        self._due: dict[object, float] = {}
        """How long a wait of some kind lasts before there is a word."""
        self._stopped = Event()
        activity.find_verdict, activity.publish = self._find_verdict, self._publish_now
        self._thread = Thread(target=self._watch, name="vpipe lookout", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, before the interpreter does."""
        self._stopped.set()
        self._thread.join(_STOPPING_SECONDS)

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        self._tick += 1
        own = self._sight()
        wait = own.wait
        is_long = wait is not None and time.time() - wait.since >= _LONG_SECONDS
        if self._verdict is not None and (self._told is None or not own.is_at(self._told)):
            self._verdict = None  # somebody has caught the error, and has gone on
            own = self._sight()
        self._tell(own, is_long)
        self._before = own
        if wait is None or not is_long or self._verdict is not None:
            return
        seen, waiting = self._read(own)
        self._verdict = _taken_over(own, seen) or judge(own.rank, seen, waiting)
        if self._verdict is None:
            self._warn(own, wait, seen)
        elif self._activity.wait is not wait:
            self._verdict = None  # what was late has come meanwhile
        else:
            self._publish(self._sight())  # before others see that a connection was closed
            _close(self._activity, wait)

    def _sight(self, *, lasts: bool = False) -> Sighting:
        return Sighting.of(self._activity, self._tick, self._verdict, lasts=lasts)

    def _tell(self, own: Sighting, is_long: bool) -> None:
        """Let others read what lasts; what was told, and does not hold any more, is replaced."""
        if own.is_as(self._before):
            if is_long or self._told is None or not self._told.lasts or not own.is_as(self._told):
                self._publish(replace(own, lasts=True))
        elif self._told is None or self._told.lasts:
            self._publish(own)

    def _publish(self, own: Sighting) -> None:
        self._told = own
        with self._losing_store():
            if self._store is not None:
                self._store.set(str(own.rank), own.dump())

    def _publish_now(self) -> None:
        self._publish(self._sight(lasts=True))

    def _read(self, own: Sighting) -> tuple[dict[int, Sighting], set[int]]:
        """Return what is seen of all ranks, and those that wait all at one moment.

        A rank that was seen in the same wait at the last look, and has told it again since, was waiting at that look.
        """
        seen = self._read_others()
        wait, before = self._seen
        before = before if wait == own.wait else {}
        self._seen = own.wait, seen
        waiting = {
            rank
            for rank, other in seen.items()
            if other.wait is not None
            and (last := before.get(rank)) is not None
            and last.wait == other.wait
            and last.tick < other.tick
        }
        return {**seen, own.rank: own}, {*waiting, own.rank}

    def _read_others(self) -> dict[int, Sighting]:
        seen = {}
        with self._losing_store():
            for rank in self._activity.others if self._store is not None else ():
                if self._store is not None and self._store.check([str(rank)]):
                    with suppress(ValueError):
                        seen[rank] = Sighting.load(bytes(self._store.get(str(rank))).decode(errors="replace"))
        return seen

    @contextmanager
    def _losing_store(self) -> Iterator[None]:
        """Do without the store when its host has ended: then others are known to be gone by other signs."""
        try:
            yield
        except RuntimeError:
            self._store = None

    def _warn(self, own: Sighting, wait: Wait, seen: dict[int, Sighting]) -> None:
        kind = own.place.call, wait.peers, wait.meeting is None
        seconds = time.time() - wait.since
        if seconds >= self._due.get(kind, _FIRST_WORD_SECONDS):
            self._due[kind] = seconds * _NEXT_WORD_FACTOR
            logger.warning("Rank %d is %s", own.rank, describe_wait(own, seen))

    def _find_verdict(self, ask_others: bool) -> VPipeError | None:
        """Return why the wait of this rank can never end; on the thread that waits."""
        verdict = self._verdict
        if verdict is None and ask_others:
            own = self._sight()
            seen = {**self._read_others(), own.rank: own}
            verdict = _taken_over(own, seen) or judge(own.rank, seen, {own.rank})
            # That a rank has failed is told in its own words, by way of `Failures`.
            verdict = None if verdict is not None and verdict.is_loss else verdict
        if verdict is None:
            return None
        return PeerLostError(verdict.text) if verdict.is_loss else ExecutionError(verdict.text)


def _taken_over(own: Sighting, seen: dict[int, Sighting]) -> Verdict | None:
    """Return what another rank has found out, that this one waits for or that has found it out for this one, too."""
    peers = () if own.wait is None else own.wait.peers
    for rank, other in seen.items():
        if other.verdict is not None and (own.rank in other.verdict.ranks or rank in peers):
            return other.verdict
    return None


def _close(activity: Activity, wait: Wait) -> None:
    """End a wait of torch, which cannot be interrupted, by an error: close the connections of its group."""
    group = activity.group
    if group is None or not wait.peers:
        return  # the thread that waits for shared memory looks by itself
    with suppress(RuntimeError):
        if dist.get_backend(group) == "nccl":
            group.abort()
            return
        # With gloo a receive that is not there in time closes the connections of its group.
        peer = dist.get_group_rank(group, activity.processes[wait.peers[0]])
        group.recv([torch.zeros(1)], peer, _CLOSING_TAG).wait(timedelta(milliseconds=1))
