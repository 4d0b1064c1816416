"""Weight versions of which those that wait are in host memory.

The trained parameters of each set lie in one storage of their own, so a version moves as one parcel. A version is
copied out while it is the newest and in use. The update that follows puts the next version into memory that another
one no longer needs, or else into that of the version which has left, and reads it from the host. Graphs go on pointing
at the storage of the set: its memory is gone meanwhile, and a new one when the version is back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from torch import Tensor, UntypedStorage, nn

from vpipe.runtime.memory.host_link import HostLink
from vpipe.runtime.memory.swap import Parcel
from vpipe.runtime.weights.stage_optimizer import OptimizerFactory
from vpipe.runtime.weights.weights import Resized, WeightVersions

__all__ = ["MovableVersions", "WeightParcel"]

T = TypeVar("T")

_ALIGNMENT = {"cpu": 64, "cuda": 512}
"""Bytes, as torch's allocators have it: kernels may choose by it how they compute."""


class WeightParcel(Parcel):
    """The memory under one parameter set; it comes back to the storage that it has left."""

    __slots__ = ("_resized", "_storage")

    missing = "a computation needs weights that were moved to host memory and not fetched; put a FETCH_V before it"

    def __init__(self, storage: UntypedStorage, resized: Resized) -> None:
        super().__init__(storage)
        self._storage, self._resized = storage, resized

    def room(self, device: torch.device, tell: Callable[[], None]) -> Tensor:
        """Give the storage memory again."""
        self._resized(self.num_bytes, by_link=True)
        self._storage.resize_(self.num_bytes)
        return _bytes_of(self._storage)


class MovableVersions(WeightVersions):
    """`WeightVersions` with `offload` and `fetch`, through `link`; it uses what is away only when it is back."""

    link: HostLink

    def __init__(self, modules: Sequence[nn.Module], names: Sequence[str], optimizer: OptimizerFactory) -> None:
        """Start with `modules` as the only version; `names` are their trainable parameters' model-wide names.

        Raises:
            ConfigError: `optimizer` does not make an optimizer of these parameters.
        """
        super().__init__(modules, names, optimizer)
        self._leaving: dict[int, WeightParcel] = {}
        self._away: dict[int, WeightParcel] = {}
        storage, tensors = _lay_out(self._parameters[0])
        for parameter, master, tensor in zip(self._parameters[0], self.parameters, tensors, strict=True):
            tensor.copy_(parameter.data)
            parameter.data = master.data = tensor
        self._storages = [storage]
        self._num_bytes = storage.nbytes()

    def older_bytes(self) -> int:
        """Return the bytes that sets take on the device besides the newest."""
        return sum(storage.nbytes() for storage in self._storages) - self._num_bytes

    def offload(self, version: int) -> None:
        """Begin to copy `version`, the newest, to host memory: the next update takes its place."""
        if self._num_bytes:
            parcel = WeightParcel(self._storages[self._set_of[version]], self.resized)
            self.link.copy_out(parcel)
            self._leaving[version] = parcel

    def fetch(self, version: int) -> None:
        """Begin to bring `version` back."""
        if version in self._away:
            self.link.fetch((-1, version), [self._away[version]])

    def modules(self, version: int) -> nn.ModuleList:
        """Return the modules of `version`, when they are back.

        Raises:
            ScheduleError: the version is not there (any more), or nobody has sent for it.
        """
        self._wait_for(version)
        return super().modules(version)

    def accumulate(self, version: int, backward: Callable[[], T], *, is_last_use: bool = True) -> T:
        """Run the backward of one microbatch, as soon as the version that it used is back."""
        self._wait_for(version)
        return super().accumulate(version, backward, is_last_use=is_last_use)

    def _wait_for(self, version: int) -> None:
        if version in self._away:
            self._away.pop(version).content()

    def step(self, *, apply: bool = True) -> None:
        """Make the next version, when the newest has left if it leaves, and free what is no longer needed."""
        parcel = self._leaving.pop(self._newest, None)
        if parcel is not None:
            assert parcel.departure is not None
            parcel.departure.wait()
            if parcel.error is not None:
                raise parcel.error
            parcel.device = None
            self._away[self._newest] = parcel
        super().step(apply=apply)
        for index in self._free_sets():
            self._release(index)

    def _copy_newest(self) -> int:
        source, away = self._set_of[self._newest], self._away.get(self._newest)
        ready = [index for index in self._free_sets() if self._storages[index].nbytes()]
        if away is not None and not ready:
            self._release(source)
        target = ready[0] if ready else self._make_room()
        place = _bytes_of(self._storages[target])
        if away is not None and not ready:
            assert away.host is not None
            place.copy_(away.host)
        else:
            place.copy_(_bytes_of(self._storages[source]))
        if away is not None and ready:
            self._release(source)
        for master, parameter in zip(self.parameters, self._parameters[target], strict=True):
            master.data = parameter.data
        return target

    def _free_sets(self) -> list[int]:
        taken = set(self._set_of.values())
        return [index for index in range(len(self._sets)) if index not in taken]

    def _make_room(self) -> int:
        """Return a set that no version has, with memory."""
        for index in self._free_sets():
            self.resized(self._num_bytes)
            self._storages[index].resize_(self._num_bytes)
            return index
        storage, tensors = _lay_out(self._parameters[0])
        self._storages.append(storage)
        return self._add_set(
            {id(old): type(old)(tensor) for old, tensor in zip(self._parameters[0], tensors, strict=True)}
        )

    def _release(self, index: int) -> None:
        if num_bytes := self._storages[index].nbytes():
            self._storages[index].resize_(0)
            self.resized(-num_bytes)

    def _set_bytes(self) -> int:
        return self._num_bytes


def _lay_out(parameters: Sequence[nn.Parameter]) -> tuple[UntypedStorage, list[Tensor]]:
    """Return a storage with room for parameters like these, and tensors in it; nothing is written."""
    device = parameters[0].device if parameters else torch.device("cpu")
    grain = _ALIGNMENT.get(device.type, 512)
    sizes = [-(-item.numel() * item.element_size() // grain) * grain for item in parameters]
    storage = UntypedStorage(sum(sizes), device=device)  # type: ignore[no-untyped-call]
    tensors = []
    for item, (start, _) in zip(parameters, pairwise([0, *accumulate(sizes)]), strict=True):
        strides = torch.empty_like(item, device="meta").stride()
        empty = torch.empty(0, dtype=item.dtype, device=device)
        tensors.append(empty.set_(storage, start // item.element_size(), item.shape, strides))
    return storage, tensors


def _bytes_of(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
