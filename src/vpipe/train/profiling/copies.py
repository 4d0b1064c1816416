"""Copies to host memory and back that go on beside a computation, by the link that a run swaps with."""

from __future__ import annotations

import torch

from vpipe.plan.profile import LinkProfile
from vpipe.runtime.host_link import open_host_link
from vpipe.runtime.swap import Parcel

__all__ = ["Copier"]

_PARCEL_BYTES = 1 << 20
_NUM_PARCELS = 32
"""Together more than the caches that a core has for itself, as what a stage swaps."""


class Copier:
    """Copies parcels out and back, on demand; `host` says how fast that is when nothing else is done."""

    def __init__(self, device: torch.device, host: LinkProfile) -> None:
        self._link = open_host_link(device, None)
        self._parcel_ms = 2 * host.transfer_ms(_PARCEL_BYTES)
        self.parcels = [
            Parcel(torch.ones(_PARCEL_BYTES, dtype=torch.uint8, device=device).untyped_storage())
            for _ in range(_NUM_PARCELS)
        ]
        self._next = 0

    @property
    def bytes_copied(self) -> int:
        """Count what was copied, out and back."""
        return self._link.bytes_offloaded + self._link.bytes_fetched

    def begin(self, milliseconds: float) -> float:
        """Begin copies that would take about so long by themselves, one at least; return how long exactly."""
        count = max(1, round(milliseconds / self._parcel_ms)) if self._parcel_ms else 1
        for _ in range(count):
            parcel = self.parcels[self._next]
            self._next = (self._next + 1) % _NUM_PARCELS
            self._link.copy_out(parcel)
            self._link.fetch((0, 0), [parcel])
        return count * self._parcel_ms

    def finish(self) -> None:
        """Wait until all copies are done.

        Raises:
            ExecutionError: there is no room for them.
        """
        for parcel in self.parcels:
            parcel.content()

    def close(self) -> None:
        """Stop."""
        self._link.close()
