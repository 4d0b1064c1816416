"""What a rank is doing: its call, its batch, and whom it waits for, written down for ranks that wait for it.

The thread that works writes here, which costs next to nothing; a `Lookout` reads it and tells the others. All that is
counted here is counted alike on all ranks, so that their counts say who is behind whom.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from vpipe.errors import VPipeError
from vpipe.runtime.comm.failure import raise_if_peer_lost

__all__ = ["CLOSED", "EVERYTHING", "Activity", "Begun", "Calls", "LastCall", "Meeting", "Place", "Wait", "ended_by"]

T = TypeVar("T")

_RECENT = 8
"""How many of the last meetings a rank remembers."""

CLOSED = "closed"
"""Why a pipeline that was left as it should be can do nothing any more."""

EVERYTHING = -1
"""Stands for all pipelines of a world."""

_SAME_CALL = {"step": "train"}
"""A step is the training of one batch: ranks may choose either way."""


class Wait(NamedTuple):
    """What a rank waits for, and which positions have to act for that."""

    what: str
    peers: tuple[int, ...]
    since: float
    """Seconds since the epoch."""
    meeting: int | None = None
    """The number of a meeting of all ranks; None: a message, or a meeting of some."""


class Place(NamedTuple):
    """Where a rank is in the caller's program."""

    call: str = ""
    """The method of the public API that it is in; none: in the caller's own code."""
    since: float = 0.0
    pipeline: int = EVERYTHING
    """Pipelines of a world are counted from 0."""
    began: int = 0
    """Iterations done when a training call began."""
    done: int | None = None
    """Batches done by a training call; None for other calls."""
    of: int | None = None
    phase: str = "running"
    """Or ``reading``: in the caller's data; or ``between``: in the caller's code between two results."""


class LastCall(NamedTuple):
    """How the last call ended: ``ended``, ``left`` by the caller before its end, or by an exception."""

    place: Place
    how: str


class Meeting(NamedTuple):
    """What a meeting of all ranks was for, as one of them saw it."""

    number: int
    key: str


class Begun(NamedTuple):
    """How many programs a pipeline has begun, and the kind of the last one."""

    number: int
    kind: str


class Activity:
    """What this rank is doing; `processes` has torch's rank of the process at each position."""

    def __init__(self, rank: int = 0, processes: Sequence[int] = (0,)) -> None:
        self.rank, self.processes = rank, tuple(processes)
        self.place = Place(since=time.time())
        self.last: LastCall | None = None
        self.wait: Wait | None = None
        self.group: dist.ProcessGroup | None = None
        """What would have to be closed to end the wait; None for shared memory, where the waiting thread looks here."""
        self.meetings: tuple[Meeting, ...] = ()
        """The last ones; like all that is read on another thread, they are replaced and never changed."""
        self.programs: Mapping[int, Begun] = {}
        self.ended: Mapping[int, str] = {}
        """Pipelines that can do nothing any more, and why."""
        self.find_verdict: Callable[[bool], VPipeError | None] = lambda ask_others: None
        """Returns why a wait of this rank can never end, if this one has found that out, or another one."""
        self.publish: Callable[[], None] = lambda: None
        """Tells others at once what this rank is doing: before it may end."""
        self._num_meetings = self._num_pipelines = 0

    @property
    def others(self) -> tuple[int, ...]:
        """Return the positions of all other ranks."""
        return tuple(position for position in range(len(self.processes)) if position != self.rank)

    def calls(self) -> Calls:
        """Return where a new pipeline writes what is called; made in the same order on all ranks."""
        self._num_pipelines += 1
        return Calls(self, self._num_pipelines - 1)

    def key(self, what: str) -> str:
        """Return what ranks that meet for the same thing in the same call have in common."""
        return f"{_SAME_CALL.get(self.place.call, self.place.call)}: {what}"

    @contextmanager
    def waiting(
        self, what: str, peers: Sequence[int] | None = None, group: dist.ProcessGroup | None = None
    ) -> Iterator[None]:
        """Wait inside for what some ranks have to do; None: all others.

        Raises:
            PeerLostError: one of them died or did not answer in time; the text says `what` it was waited for.
            ExecutionError: it is certain that it will never come.
        """
        known = self.others if peers is None else tuple(peers)
        self.begin_wait(what, known, group)
        try:
            yield
        except RuntimeError as error:
            self.raise_if_lost(error, what, known[0] if peers is not None and len(known) == 1 else None)
            raise
        finally:
            self.wait = None

    @contextmanager
    def meeting(self, what: str, group: dist.ProcessGroup | None, source: int | None = None) -> Iterator[None]:
        """Meet all other ranks inside, or wait for `source` alone; as `waiting`, and counted."""
        self._num_meetings += 1
        self.meetings = (*self.meetings[1 - _RECENT :], Meeting(self._num_meetings, self.key(what)))
        peers = self.others if source is None or source == self.rank else (source,)
        self.begin_wait(what, peers, group, self._num_meetings)
        try:
            yield
        except RuntimeError as error:
            self.raise_if_lost(error, what)
            raise
        finally:
            self.wait = None

    @contextmanager
    def during(self, call: str, pipeline: int = EVERYTHING) -> Iterator[None]:
        """Be in a call inside; one that another call of the library makes is a part of that."""
        before = self.place
        if before.call and before.phase == "running":
            yield
            return
        self.place = Place(call, time.time(), pipeline)
        how = "ended"
        try:
            yield
        except BaseException as error:
            how = ended_by(error)
            raise
        finally:
            self.leave(how, before)

    def leave(self, how: str, before: Place) -> None:
        """Write down that the call is over, and what is gone on with."""
        self.last = LastCall(self.place, how)
        self.place = before._replace(since=time.time())

    def end(self, why: str, pipeline: int = EVERYTHING) -> None:
        """Say that a pipeline, or all that there are, can do nothing any more."""
        self.ended = {pipeline: why, **self.ended}
        self.publish()

    def begin_wait(
        self, what: str, peers: tuple[int, ...], group: dist.ProcessGroup | None, meeting: int | None = None
    ) -> None:
        """Write down a wait; whoever does so sets `wait` to None afterwards."""
        self.group, self.wait = group, Wait(what, peers, time.time(), meeting)

    def raise_verdict(self) -> None:
        """Raise what was found out about this wait, if it can never end."""
        if (verdict := self.find_verdict(False)) is not None:
            raise verdict

    def raise_if_lost(self, error: RuntimeError, what: str, peer: int | None = None) -> None:
        """Say why torch ended a wait: because it could never end, or because another rank is gone.

        Raises:
            ExecutionError, PeerLostError: that is why; returns otherwise.
        """
        if (verdict := self.find_verdict(True)) is not None:
            raise verdict from error
        raise_if_peer_lost(error, what, peer)


class Calls:
    """What is called of one pipeline."""

    def __init__(self, activity: Activity, pipeline: int) -> None:
        self._activity = activity
        self._pipeline = pipeline

    def during(self, call: str) -> AbstractContextManager[None]:
        """Be in a call inside."""
        return self._activity.during(call, self._pipeline)

    def following(self, results: Iterator[T], iteration: Callable[[], int], batches: object) -> Iterator[T]:
        """Yield the results of a training call of so many `batches`, or of these; the caller's code runs in between."""
        activity = self._activity
        before, began = activity.place, iteration()
        place = Place("train", time.time(), self._pipeline, began, 0, _count(batches))
        if before.call and before.phase == "running":  # as a part of `step`
            activity.place = place._replace(call=before.call)
            yield from results
            activity.place = before
            return
        activity.place = place
        how, done = "ended", 0
        try:
            for result in results:
                done += 1
                activity.place = place._replace(since=time.time(), done=done, phase="between")
                yield result
                activity.place = place._replace(since=time.time(), done=done)
        except GeneratorExit:
            how = "left"
            raise
        except BaseException as error:
            how = ended_by(error)
            raise
        finally:
            now = activity.place
            if (now.call, now.pipeline, now.began) == ("train", self._pipeline, began):
                activity.leave(how, Place())  # else it was dropped, and something else is being done

    def reading(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the caller's batches; while one is awaited, this rank is said to wait for its data."""
        activity = self._activity
        while True:
            before = activity.place
            activity.place = before._replace(since=time.time(), phase="reading")
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                activity.place = before
            yield batch

    def begin(self, kind: str) -> None:
        """Count a program, of the same kind on all ranks."""
        activity = self._activity
        before = activity.programs.get(self._pipeline)
        number = 1 if before is None else before.number + 1
        activity.programs = {**activity.programs, self._pipeline: Begun(number, kind)}

    def end(self, why: str) -> None:
        """Say that the pipeline can do nothing any more."""
        self._activity.end(why, self._pipeline)


def _count(batches: object) -> int | None:
    if isinstance(batches, int):
        return batches
    try:
        return len(batches)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def ended_by(error: BaseException) -> str:
    """Say what an error is, in one line."""
    return f"{type(error).__name__}: {error}"
