"""What can be moved to host memory: parcels of memory, and activations between forward and backward.

While a block that swaps runs, autograd hands over what it saves. Until the microbatch is packed up nothing changes.
Then the memory under these tensors becomes *parcels*, one per storage, which a `HostLink` takes away and brings back;
the tensors themselves are made again from a parcel's bytes, of which they are the same views as before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from vpipe.errors import ModelError, ScheduleError

__all__ = ["Arrival", "Kept", "Parcel", "Swapped", "take"]

SMALL_BYTES = 4096
"""What is not larger stays, because moving it would take longer than its memory is worth."""


class Arrival(Protocol):
    """What tells that a parcel's bytes are there."""

    def wait(self) -> object:
        """Wait until they are."""


class Parcel:
    """The memory of one storage: on the device, on the host, or on its way."""

    __slots__ = ("__weakref__", "arrival", "departure", "device", "error", "host", "num_bytes", "place")

    missing = "a backward needs activations that were moved to host memory and not fetched; put a FETCH before it"

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.place = storage.data_ptr()
        """Where it lay when it was packed up."""
        self.num_bytes = storage.nbytes()
        self.device: Tensor | None = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self.host: Tensor | None = None
        self.arrival: Arrival | None = None
        self.departure: Arrival | None = None
        self.error: BaseException | None = None

    def content(self) -> Tensor:
        """Wait for the bytes and return them, on the device.

        Raises:
            ScheduleError: nobody has sent for them.
        """
        if self.arrival is not None:
            self.arrival.wait()
        if self.error is not None:
            raise self.error
        if self.device is None:
            raise ScheduleError(self.missing)
        return self.device

    def room(self, device: torch.device, tell: Callable[[], None]) -> Tensor:
        """Return memory on the device for the bytes to come back to; `tell` before that it is taken."""
        tell()
        return torch.empty(self.num_bytes, dtype=torch.uint8, device=device)


class Kept:
    """One tensor that autograd saved: as it was, or as a view of a parcel's bytes."""

    __slots__ = ("__weakref__", "parcel", "shape", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor.detach()
        self.version = tensor._version
        self.parcel: Parcel | None = None
        self.shape: tuple[Any, ...] = ()

    def check(self, tensor: Tensor) -> None:
        """Do what autograd does for tensors that it keeps itself.

        Raises:
            ModelError: the tensor was changed in place since it was saved.
        """
        if tensor._version != self.version:
            raise ModelError(
                f"a tensor of shape {tuple(tensor.shape)} that the backward needs was changed in place after the "
                "forward had used it; replace the in-place operation"
            )

    def move_into(self, parcel: Parcel) -> None:
        """Become a view of a parcel's bytes."""
        assert self.tensor is not None
        tensor, self.tensor, self.parcel = self.tensor, None, parcel
        self.check(tensor)
        self.shape = tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride()

    def take(self) -> Tensor:
        """Return the tensor."""
        if self.tensor is not None:
            self.check(self.tensor)
            return self.tensor
        assert self.parcel is not None
        content = self.parcel.content()
        dtype, offset, size, stride = self.shape
        return torch.empty(0, dtype=dtype, device=content.device).set_(content.untyped_storage(), offset, size, stride)


def take(kept: Kept) -> Tensor:
    """Give autograd back what it saved."""
    return kept.take()


class Swapped:
    """What the swapping blocks of one microbatch saved, and its parcels once they are packed up."""

    def __init__(self) -> None:
        self._kept: list[weakref.ref[Kept]] = []
        self._parcels: list[weakref.ref[Parcel]] = []

    def run(self, call: Callable[..., Any], *inputs: Any) -> Any:
        """Run a block and hold on to what it saves."""
        with saved_tensors_hooks(self._save, take):
            return call(*inputs)

    def _save(self, tensor: Tensor) -> Kept:
        kept = Kept(tensor)
        if _is_plain(tensor):
            self._kept.append(weakref.ref(kept))
        return kept

    def pack_up(self, staying: Container[int]) -> list[Parcel]:
        """Turn memory that autograd still needs into parcels, but for storages at the places `staying`."""
        parcels: dict[int, Parcel] = {}
        for kept in self._alive():
            if kept.tensor is None:
                continue
            storage = kept.tensor.untyped_storage()
            place = storage.data_ptr()
            if storage.nbytes() > SMALL_BYTES and place not in staying:
                if place not in parcels:
                    parcels[place] = Parcel(storage)
                kept.move_into(parcels[place])
        self._parcels += map(weakref.ref, parcels.values())
        return list(parcels.values())

    def parcels(self) -> list[Parcel]:
        """Return the parcels that autograd still needs, the last packed first, as the backward will."""
        found = (reference() for reference in reversed(self._parcels))
        return [parcel for parcel in found if parcel is not None]

    def tensors(self) -> Iterator[Tensor]:
        """Yield what has not been packed up."""
        for kept in self._alive():
            if kept.tensor is not None:
                yield kept.tensor

    def _alive(self) -> Iterator[Kept]:
        for reference in self._kept:
            if (kept := reference()) is not None:
                yield kept


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is nothing but a view of its storage."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_conj()
        and not tensor.is_neg()
    )
