"""Copies to host memory and back that go on beside a computation, by the link that a run swaps with.

As in a run, what has left frees its memory, and what comes back gets other memory, after something else was computed.
The same few bytes going to and fro would stay in a core's caches, and cost less.
"""

from __future__ import annotations

from pathlib import Path

import torch

from vpipe.planner.profile.profile import LinkProfile
from vpipe.runtime.memory.host_link import open_host_link
from vpipe.runtime.memory.swap import Parcel

__all__ = ["Copier"]

_PARCEL_BYTES = 1 << 19
_NUM_PARCELS = 128


class Copier:
    """Moves parcels on demand: one after another out, then all of them back, and so on.

    `host` says how fast that is when nothing else is done, `directory` where a CPU's parcels go.
    """

    def __init__(self, device: torch.device, host: LinkProfile, directory: Path | None = None) -> None:
        self._device = device
        self._link = open_host_link(device, directory)
        self._parcel_ms = host.transfer_ms(_PARCEL_BYTES)
        self.parcels = [
            Parcel(torch.ones(_PARCEL_BYTES, dtype=torch.uint8, device=device).untyped_storage())
            for _ in range(_NUM_PARCELS)
        ]
        self._num_moved = 0
        self._under_way: set[int] = set()

    @property
    def bytes_copied(self) -> int:
        """Count what was copied, out and back."""
        return self._link.bytes_offloaded + self._link.bytes_fetched

    def begin(self, milliseconds: float) -> float:
        """Begin copies that would take about so long by themselves, one at least; return how long exactly.

        What was begun before has to be finished.
        """
        count = max(1, round(milliseconds / self._parcel_ms)) if self._parcel_ms else 1
        for _ in range(count):
            lap, index = divmod(self._num_moved, _NUM_PARCELS)
            parcel = self.parcels[index]
            if lap % 2 == 0:
                self._link.copy_out(parcel)
            else:
                self._link.fetch((0, 0), [parcel])
                parcel.departure = None
            self._under_way.add(index)
            self._num_moved += 1
        return count * self._parcel_ms

    def finish(self) -> None:
        """Wait until all copies are done.

        Raises:
            ExecutionError: there is no room for them.
        """
        for parcel in map(self.parcels.__getitem__, self._under_way):
            if parcel.departure is None:
                parcel.content()
            else:
                parcel.departure.wait()
                parcel.device = parcel.departure = None
            if parcel.error is not None:
                raise parcel.error
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # it is the stream that waits for the copies, so far
        self._under_way.clear()

    def close(self) -> None:
        """Stop."""
        self._link.close()
