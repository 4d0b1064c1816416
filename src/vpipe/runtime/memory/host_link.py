"""The way to host memory: copies parcels out and back, one after another, beside the computation.

On a CPU a thread does the copying; torch and the copy itself leave the interpreter to others. On a GPU copies are
queued on a stream of their own. Both go strictly in order, and an `offload` waits until the one before it is over: so
no more than one microbatch is on its way out, and what is fetched takes the place of what has left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Protocol

import torch
from torch import Tensor

from vpipe.errors import ExecutionError
from vpipe.runtime.memory.host_memory import HostMemory, MappedMemory, PinnedMemory
from vpipe.runtime.memory.swap import Parcel

__all__ = ["HostLink", "Moved", "StreamLink", "ThreadLink", "open_host_link"]

Owner = tuple[int, int]
"""Stage and microbatch."""
_NOBODY = (-1, -1)
Moved = Callable[[Owner, Parcel, bool], None]
"""Is told that a parcel is packed up or about to come back (True), or about to leave; on the thread that does it."""


class HostLink(Protocol):
    """One rank's link."""

    bytes_offloaded: int
    bytes_fetched: int

    def offload(self, owner: Owner, parcels: Sequence[Parcel]) -> None:
        """Begin to move parcels out; wait before that until the last ones have left."""

    def fetch(self, owner: Owner, parcels: Sequence[Parcel]) -> None:
        """Begin to bring parcels back, in this order."""

    def copy_out(self, parcel: Parcel) -> None:
        """Begin to copy a parcel that stays where it is; its `departure` tells when that is done."""

    def close(self) -> None:
        """Stop; what is under way is finished first."""


def open_host_link(device: torch.device, directory: Path | None, moved: Moved = lambda *_: None) -> HostLink:
    """Return the link of a device; on a CPU host memory is a mapped file in `directory`."""
    if device.type == "cuda":
        return StreamLink(device, PinnedMemory(), moved)
    return ThreadLink(MappedMemory(directory), moved)


class ThreadLink:
    """Copies on a thread, which starts with the first parcel. Errors are raised where a parcel is needed."""

    def __init__(self, memory: HostMemory, moved: Moved = lambda *_: None) -> None:
        self.bytes_offloaded = 0
        self.bytes_fetched = 0
        self._memory = memory
        self._moved = moved
        self._jobs: SimpleQueue[tuple[Callable[[Owner, Parcel], None], Owner, Parcel, Event] | None] = SimpleQueue()
        self._thread: Thread | None = None
        self._left: Event | None = None

    def offload(self, owner: Owner, parcels: Sequence[Parcel]) -> None:
        """Begin to move parcels out; wait before that until the last ones have left."""
        if self._left is not None:
            self._left.wait()
        for parcel in parcels:
            self._moved(owner, parcel, True)
        for parcel in parcels:
            self._left = self._add(self._move_out, owner, parcel)

    def fetch(self, owner: Owner, parcels: Sequence[Parcel]) -> None:
        """Begin to bring parcels back, in this order."""
        for parcel in parcels:
            parcel.arrival = self._add(self._bring_back, owner, parcel)

    def copy_out(self, parcel: Parcel) -> None:
        """Begin to copy a parcel that stays where it is; its `departure` tells when that is done."""
        parcel.departure = self._add(self._copy_out, _NOBODY, parcel)

    def _add(self, job: Callable[[Owner, Parcel], None], owner: Owner, parcel: Parcel) -> Event:
        if self._thread is None:
            self._thread = Thread(target=self._work, name="vpipe host link", daemon=True)
            self._thread.start()
        done = Event()
        self._jobs.put((job, owner, parcel, done))
        return done

    def _work(self) -> None:
        while (entry := self._jobs.get()) is not None:
            job, owner, parcel, done = entry
            try:
                if parcel.error is None:
                    job(owner, parcel)
            except (RuntimeError, ExecutionError) as error:
                parcel.error = error
            done.set()
            # Or the parcel's memory would live until the next one comes.
            del entry, job, owner, parcel, done

    def _copy_out(self, owner: Owner, parcel: Parcel) -> None:
        assert parcel.device is not None
        parcel.host = self._memory.take(parcel.num_bytes)
        parcel.host.copy_(parcel.device)
        self.bytes_offloaded += parcel.num_bytes

    def _move_out(self, owner: Owner, parcel: Parcel) -> None:
        self._copy_out(owner, parcel)
        self._moved(owner, parcel, False)
        parcel.device = None

    def _bring_back(self, owner: Owner, parcel: Parcel) -> None:
        assert parcel.host is not None
        device = parcel.room(torch.device("cpu"), partial(self._moved, owner, parcel, True))
        device.copy_(parcel.host)
        self.bytes_fetched += parcel.num_bytes
        region, parcel.host, parcel.device = parcel.host, None, device
        self._memory.give(region)

    def close(self) -> None:
        """Stop; what is under way is finished first."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None


class StreamLink:
    """Copies on a CUDA stream of its own, from and to pinned memory."""

    # Written for GPUs and never run on one: development machines have none.

    def __init__(self, device: torch.device, memory: HostMemory, moved: Moved = lambda *_: None) -> None:
        self.bytes_offloaded = 0
        self.bytes_fetched = 0
        self._memory = memory
        self._moved = moved
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._left: torch.cuda.Event | None = None

    def offload(self, owner: Owner, parcels: Sequence[Parcel]) -> None:
        """Begin to move parcels out; wait before that until the last ones have left."""
        if self._left is not None:
            self._left.synchronize()
        self._stream.wait_stream(torch.cuda.current_stream())
        for parcel in parcels:
            self._moved(owner, parcel, True)
        with torch.cuda.stream(self._stream):
            for parcel in parcels:
                device = self._queue_copy(parcel)
                # The allocator gives the memory to nobody else before the copy is done.
                device.record_stream(self._stream)
                self._moved(owner, parcel, False)
                parcel.device = None
            self._left = self._stream.record_event()

    def copy_out(self, parcel: Parcel) -> None:
        """Begin to copy a parcel that stays where it is; its `departure` tells when that is done."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._queue_copy(parcel)
            # Waiting for it holds up the stream that computes, which overwrites and frees in its own order.
            parcel.departure = self._stream.record_event()

    def _queue_copy(self, parcel: Parcel) -> Tensor:
        assert parcel.device is not None
        parcel.host = self._memory.take(parcel.num_bytes)
        parcel.host.copy_(parcel.device, non_blocking=True)
        self.bytes_offloaded += parcel.num_bytes
        return parcel.device

    def fetch(self, owner: Owner, parcels: Sequence[Parcel]) -> None:
        """Begin to bring parcels back, in this order."""
        # The memory is the computing stream's: what the allocator has freed for one stream, another cannot have.
        self._stream.wait_stream(torch.cuda.current_stream())
        for parcel in parcels:
            assert parcel.host is not None
            parcel.device = parcel.room(self._stream.device, partial(self._moved, owner, parcel, True))
            parcel.device.record_stream(self._stream)
            with torch.cuda.stream(self._stream):
                parcel.device.copy_(parcel.host, non_blocking=True)
                parcel.arrival = self._stream.record_event()
            self.bytes_fetched += parcel.num_bytes
            # Whoever takes the region next writes to it on this same stream, after this copy.
            self._memory.give(parcel.host)
            parcel.host = None

    def close(self) -> None:
        """Stop; what is under way is finished first."""
        self._stream.synchronize()
