"""Messages between two processes of one machine, in memory that both see.

Sending is a write to that memory and the raising of a semaphore, without a system call unless the receiver sleeps;
receiving is a look at the semaphore. The receiver computes on the message where it lies, and hands its place back when
no tensor stands on it any more. Through a socket the same message is copied twice and wakes two threads, which takes
longer than all else that a pipeline does between two computations.

A link is one file without a name, so nothing is left behind however its processes end. The sender makes it, the
receiver opens it through the sender's entry in /proc; where that fails, as on another machine, there is no such link.
"""

from __future__ import annotations

import mmap
import os
import secrets
import select
import struct
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice

import torch
from torch import Tensor

from vpipe.errors import TransportError
from vpipe.runtime.comm.failure import peer_ended, peer_silent
from vpipe.runtime.comm.message import Message, MessageLayout
from vpipe.runtime.comm.semaphore import CACHE_LINE, Semaphore
from vpipe.runtime.comm.waits.activity import Activity

__all__ = ["Inbox", "Invitation", "Outbox", "open_inbox", "open_outbox"]

_CPU = torch.device("cpu")
_LOOK_SECONDS = 0.1
"""How often a rank that waits looks whether the other one lives."""

_NAME = "vpipe-link"
_TOKEN_BYTES = 16
_PAGE = mmap.ALLOCATIONGRANULARITY
_ENTRY = struct.Struct("<qq")
"""Where a message lies in the file, and how long it is."""
_NUM_ENTRIES = 1024
_RING_BYTES = 2 * CACHE_LINE + _NUM_ENTRIES * _ENTRY.size
_SENT, _RETURNED = CACHE_LINE, CACHE_LINE + _RING_BYTES
_CONTROL_BYTES = -(-(_RETURNED + _RING_BYTES) // _PAGE) * _PAGE


@dataclass(frozen=True)
class Invitation:
    """Where a receiver finds the file of a sender, and how it knows that it is the right one."""

    pid: int
    descriptor: int
    token: bytes


class _Ring:
    """A queue of places in the file, from one process to the other; take one of `filled` or of `room` beforehand."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self.filled, self.room = Semaphore(memory, offset), Semaphore(memory, offset + CACHE_LINE)
        self._memory = memory
        self._start = offset + 2 * CACHE_LINE
        self._position = 0

    def initialise(self) -> None:
        """Make it empty."""
        self.filled.initialise(0)
        self.room.initialise(_NUM_ENTRIES)

    def put(self, place: int, num_bytes: int) -> None:
        """Append a place."""
        _ENTRY.pack_into(self._memory, self._next(), place, num_bytes)
        self.filled.post()

    def pop(self) -> tuple[int, int]:
        """Remove the oldest place."""
        place, num_bytes = _ENTRY.unpack_from(self._memory, self._next())
        self.room.post()
        return place, num_bytes

    def _next(self) -> int:
        position, self._position = self._position, (self._position + 1) % _NUM_ENTRIES
        return self._start + position * _ENTRY.size


class _Peer:
    """The process at the other end, which is `rank`."""

    def __init__(self, rank: int, pid: int, timeout: timedelta | None, activity: Activity | None) -> None:
        self.rank = rank
        self._activity = Activity() if activity is None else activity
        self._seconds = float("inf") if timeout is None else timeout.total_seconds()
        descriptor = os.pidfd_open(pid)
        weakref.finalize(self, os.close, descriptor)
        self._end = select.poll()
        self._end.register(descriptor, select.POLLIN)

    def wait(self, semaphore: Semaphore, what: str) -> None:
        """Take one of `semaphore`.

        Raises:
            PeerLostError: the process ended, or did not answer in time.
            ExecutionError: it is certain that it never will.
        """
        deadline, step = time.monotonic() + self._seconds, min(_LOOK_SECONDS, self._seconds)
        if not semaphore.wait(step):  # nearly always something comes; only what lasts is written down
            with self._activity.waiting(what, (self.rank,)):
                self._wait_until(deadline, step, semaphore, what)

    def _wait_until(self, deadline: float, step: float, semaphore: Semaphore, what: str) -> None:
        while not semaphore.wait(step):
            self._activity.raise_verdict()
            if self._end.poll(0):
                if semaphore.take():
                    return  # what it sent before it ended is there
                raise peer_ended(self.rank, what)
            if time.monotonic() >= deadline:
                raise peer_silent(self.rank, what, self._seconds)


def _reserve(descriptor: int, place: int, num_bytes: int) -> int:
    """Give a place memory, and return how much: what is only promised would end the process that writes to it."""
    size = -(-num_bytes // _PAGE) * _PAGE
    os.posix_fallocate(descriptor, place, size)
    return size


def _map(descriptor: int, place: int, num_bytes: int) -> mmap.mmap:
    return mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=place)


def _message_in(memory: mmap.mmap, layout: MessageLayout) -> Message:
    return Message(layout, _CPU, torch.frombuffer(memory, dtype=torch.uint8, count=layout.num_bytes))


@dataclass(frozen=True)
class _Slot:
    """Where messages of one channel are written, one after another."""

    place: int
    memory: mmap.mmap
    message: Message

    @property
    def channel(self) -> int:
        """Return whose messages they are."""
        return self.message.layout.channel

    def holding(self, layout: MessageLayout) -> _Slot:
        """Return this slot for messages of `layout`, which fit."""
        return self if self.message.layout is layout else replace(self, message=_message_in(self.memory, layout))


class Outbox:
    """The sender's end of a link. It owns the memory of all messages, of those that the receiver has, too.

    What the receiver gave back is used again, for any message of the channel that fits; where only smaller ones are
    free, a larger one takes the memory of one of them. Where messages may pile up that nothing else makes room for,
    such as gradients for a rank that is behind, `num_spare` says how many of a channel keep their memory when they are
    free.
    """

    def __init__(self) -> None:
        self.num_spare: int | None = None
        """None: all. Together with those that wait for the receiver."""
        self._file = os.memfd_create(_NAME)
        weakref.finalize(self, os.close, self._file)
        self._num_bytes = 0
        memory = _map(self._file, self._grow(_CONTROL_BYTES), _CONTROL_BYTES)
        self.invitation = Invitation(os.getpid(), self._file, secrets.token_bytes(_TOKEN_BYTES))
        memory[:_TOKEN_BYTES] = self.invitation.token
        self._sent, self._returned = _Ring(memory, _SENT), _Ring(memory, _RETURNED)
        for ring in (self._sent, self._returned):
            ring.initialise()
        self._free: defaultdict[int, list[_Slot]] = defaultdict(list)
        self._bare: list[_Slot] = []
        """Free, and without memory."""
        self._away: dict[int, _Slot] = {}
        self._peer: _Peer | None = None

    def connect(self, rank: int, pid: int, timeout: timedelta | None, activity: Activity | None = None) -> None:
        """Say who opened the other end."""
        self._peer = _Peer(rank, pid, timeout, activity)

    def send(self, layout: MessageLayout, serial: int, values: Mapping[str, Tensor], what: Callable[[], str]) -> None:
        """Write a message; `what` says what was waited for where the receiver takes none for very long.

        Raises:
            PeerLostError: the receiver ended, or does not take any.
            TransportError: a value does not have the agreed shape or type, or there is no memory.
        """
        self._collect()
        slot = self._take(layout)
        slot.message.pack(serial, values)
        if not self._sent.room.take():
            assert self._peer is not None
            self._peer.wait(self._sent.room, what())
        self._away[slot.place] = slot
        self._sent.put(slot.place, layout.num_bytes)
        self._release_spare()

    def _collect(self) -> None:
        """Take back what the receiver has returned."""
        while self._returned.filled.take():
            place, _ = self._returned.pop()
            slot = self._away.pop(place)
            self._free[slot.channel].append(slot)

    def _release_spare(self) -> None:
        """Give memory that is left over to the system: else what once piled up would be held for ever."""
        if self.num_spare is None:
            return
        for channel, free in self._free.items():
            waiting = sum(slot.channel == channel for slot in self._unread()) if free else 0
            while free and waiting + len(free) > self.num_spare:
                self._strip(free.pop())

    def _strip(self, slot: _Slot) -> None:
        slot.memory.madvise(mmap.MADV_REMOVE)
        self._bare.append(slot)

    def _take(self, layout: MessageLayout) -> _Slot:
        free = self._free[layout.channel]
        if free and free[-1].message.layout is layout:
            return free.pop()
        if (fitting := _smallest(free, layout.num_bytes)) is not None:
            free.remove(fitting)
            return fitting.holding(layout)
        if free:
            self._strip(free.pop())
        return self._new(layout)

    def _new(self, layout: MessageLayout) -> _Slot:
        try:
            if (bare := _smallest(self._bare, layout.num_bytes)) is not None:
                _reserve(self._file, bare.place, len(bare.memory))
                self._bare.remove(bare)
                return bare.holding(layout)
            place = self._grow(layout.num_bytes)
        except OSError as error:
            raise TransportError(
                f"no shared memory for a message of {layout.num_bytes:,} bytes beside {self._num_bytes:,} "
                f"({error.strerror}); with launch.shared_memory: false messages go through sockets"
            ) from error
        memory = _map(self._file, place, layout.num_bytes)
        return _Slot(place, memory, _message_in(memory, layout))

    def _grow(self, num_bytes: int) -> int:
        place = self._num_bytes
        self._num_bytes += _reserve(self._file, place, num_bytes)
        return place

    def _unread(self) -> Iterator[_Slot]:
        """Yield what the receiver has not looked at yet."""
        return islice(reversed(self._away.values()), _NUM_ENTRIES - self._sent.room.value)

    def memory(self) -> dict[int, int]:
        """Return place and bytes of the messages that are free, or that the receiver has not looked at yet."""
        self._collect()
        self._release_spare()
        slots = [*self._unread(), *(slot for slots in self._free.values() for slot in slots)]
        return {slot.message.buffer.data_ptr(): len(slot.memory) for slot in slots}


class Inbox:
    """The receiver's end of a link, over the sender's file."""

    def __init__(self, file: int, memory: mmap.mmap, peer: _Peer) -> None:
        self._file = file
        weakref.finalize(self, os.close, file)
        self._sent, self._returned = _Ring(memory, _SENT), _Ring(memory, _RETURNED)
        self._peer = peer
        self._messages: dict[int, tuple[mmap.mmap, Message]] = {}
        self._held: list[int] = []

    def take(self) -> bool:
        """Tell whether the next message is here; then, `receive` must follow."""
        return self._sent.filled.take()

    def wait(self, what: str) -> None:
        """Wait for the next message; `receive` must follow.

        Raises:
            PeerLostError: the sender ended, or did not answer in time.
        """
        self._peer.wait(self._sent.filled, what)

    def receive(self, layout: MessageLayout, serial: int) -> dict[str, Tensor]:
        """Return the values of the next message, where they lie.

        Raises:
            TransportError: it is not the one that was waited for.
        """
        place, num_bytes = self._sent.pop()
        if num_bytes != layout.num_bytes:
            raise TransportError(
                f"expected a message of {layout.num_bytes:,} bytes but received {num_bytes:,}; all ranks must run the "
                "same version, configuration and data"
            )
        memory, message = self._messages.get(place, (None, None))
        if memory is None or len(memory) < num_bytes:
            memory, message = _map(self._file, place, num_bytes), None
        if message is None or message.layout is not layout:
            message = _message_in(memory, layout)
            self._messages[place] = memory, message
        self._held.append(place)
        return message.unpack(serial)

    def give_back(self) -> None:
        """Let the sender use again what nobody here looks at any more."""
        held = []
        for place in self._held:
            if self._messages[place][1].is_free and self._returned.room.take():
                self._returned.put(place, 0)
            else:
                held.append(place)
        self._held = held

    def memory(self) -> dict[int, int]:
        """Return place and bytes of the messages that were received and not given back."""
        messages = [self._messages[place][1] for place in self._held]
        return {message.buffer.data_ptr(): message.buffer.numel() for message in messages}


def _smallest(slots: Sequence[_Slot], num_bytes: int) -> _Slot | None:
    """Return the smallest of `slots` that has so many bytes."""
    return min(
        (slot for slot in slots if len(slot.memory) >= num_bytes), key=lambda slot: len(slot.memory), default=None
    )


def open_outbox() -> Outbox | None:
    """Make a link's file; None where the system cannot."""
    try:
        return Outbox()
    except (AttributeError, OSError):
        return None


def open_inbox(
    invitation: Invitation, rank: int, timeout: timedelta | None, activity: Activity | None = None
) -> Inbox | None:
    """Open the file of the sender, which is `rank`; None where it is on another machine or cannot be seen.

    `activity` is where long waits are written down.
    """
    path = f"/proc/{invitation.pid}/fd/{invitation.descriptor}"
    try:
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            return None
        file = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        memory, peer = _map(file, 0, _CONTROL_BYTES), _Peer(rank, invitation.pid, timeout, activity)
    except (AttributeError, OSError, ValueError):
        os.close(file)
        return None
    inbox = Inbox(file, memory, peer)
    return inbox if memory[:_TOKEN_BYTES] == invitation.token else None
