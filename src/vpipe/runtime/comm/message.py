"""One message: all values that cross a cut for one microbatch, packed into flat bytes behind a header.

The header carries what the message is (cut and direction, serial number), a hash of the agreed names, shapes and types,
and which values are there, so that the receiver knows that it got what it waited for, instead of trusting the order of
arrival. It also carries strides: kernels round differently on values that lie otherwise, so a value that is transposed
or `channels_last` arrives as it was.

The memory of a message is used again as soon as nobody refers to it any more, which is asked of the storage that all
tensors on it share: nothing has to be released by hand, and a gradient that aliases a received message, or something
that autograd saved, is never overwritten.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from vpipe.errors import TransportError
from vpipe.model.chain import ValueSpec
from vpipe.model.rng import derive_seed
from vpipe.runtime.memory.strides import is_dense, laid_out

__all__ = ["ALIGNMENT", "GPU_ALIGNMENT", "Message", "MessageLayout"]

_CPU = torch.device("cpu")

_MISSING, _CONTIGUOUS, _DENSE, _SPREAD = range(4)
"""How a value lies in memory: not at all, as a tensor of its own would, otherwise but without gaps, or with some."""

ALIGNMENT = 64
GPU_ALIGNMENT = 512
"""Bytes; as torch aligns its own tensors, because kernels may round differently on memory that lies otherwise."""


class MessageLayout:
    """Where each value lies in a message; equal on both sides because both derive it from the same specs."""

    def __init__(self, channel: int, specs: Sequence[ValueSpec], device: torch.device = _CPU) -> None:
        """Lay out `specs` for the memory of `device`."""
        self.specs = tuple(specs)
        self.channel = channel
        self._agreement = derive_seed(*(str((spec.name, spec.shape, spec.dtype)) for spec in specs))
        # Channel, serial number, agreement; then for each value whether it is there and how it lies, and all strides.
        self.num_strides = sum(len(spec.shape) for spec in self.specs)
        self.header = struct.Struct(f"<3q{len(self.specs)}B{self.num_strides}q")
        self._places: list[slice] = []
        grain = ALIGNMENT if device.type == "cpu" else GPU_ALIGNMENT
        end = _aligned(self.header.size, grain)
        for spec in specs:
            self._places.append(slice(end, end + spec.num_bytes))
            end = _aligned(end + spec.num_bytes, grain)
        self.num_bytes = end if self.specs else 0

    def identity(self, serial: int) -> tuple[int, int, int]:
        """Return what tells a message from all others: channel, serial number, and the hash of what was agreed."""
        return self.channel, serial, self._agreement

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the values' places in `buffer`."""
        return {
            spec.name: buffer[place].view(spec.dtype).view(spec.shape)
            for spec, place in zip(self.specs, self._places, strict=True)
        }

    def split_strides(self, strides: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Yield the part of each value."""
        begin = 0
        for spec in self.specs:
            end = begin + len(spec.shape)
            yield tuple(strides[begin:end])
            begin = end


class Message:
    """One message in memory of its own, which serves many. What can be prepared before it is filled is prepared here.

    Receivers that share a synchronous schedule's critical path wait for what happens between arrival and use, which is
    why views and header are not made then.
    """

    def __init__(self, layout: MessageLayout, device: torch.device, memory: Tensor | None = None) -> None:
        """Use `memory`, bytes that are there already, or new ones."""
        self.buffer = torch.empty(layout.num_bytes, dtype=torch.uint8, device=device) if memory is None else memory
        self.values = layout.views(self.buffer)
        """Views of all values, whatever the header says; missing ones are 0."""
        self.layout = layout
        # Python's own access to host memory is several times as quick as tensor operations.
        self._memory = self.buffer.numpy().data if device.type == "cpu" else None
        self._storage = self.buffer.untyped_storage()
        self._own_references = self._count_references()

    def _count_references(self) -> int:
        return int(torch._C._storage_Use_Count(self._storage._cdata))

    @property
    def is_free(self) -> bool:
        """Say whether no tensor but the message's own stands on its memory."""
        return self._count_references() == self._own_references

    @property
    def capacity(self) -> int:
        """Return how many bytes a message in this memory can have."""
        return self._storage.nbytes()

    def turned_into(self, layout: MessageLayout) -> Message:
        """Give this memory, which is free and large enough, to a message of another layout, and return that."""
        empty = torch.empty(0, dtype=torch.uint8, device=self.buffer.device)
        made = Message(layout, empty.device, empty.set_(self._storage)[: layout.num_bytes])
        del self.buffer, self.values, self._memory, self._storage, empty
        made._own_references = made._count_references()
        return made

    def pack(self, serial: int, values: Mapping[str, Tensor]) -> None:
        """Write `values`; one that is missing, such as a gradient that is zero everywhere, is marked so.

        Raises:
            TransportError: a value does not have the agreed shape or type.
        """
        ways: list[int] = []
        strides: list[int] = []
        for spec in self.layout.specs:
            value, target = values.get(spec.name), self.values[spec.name]
            if value is None:
                ways.append(_MISSING)
                strides += target.stride()
                target.zero_()
            elif value.shape != target.shape or value.dtype != target.dtype:
                raise TransportError(
                    f"'{spec.name}' was agreed as {spec.shape} {spec.dtype} but is {tuple(value.shape)} {value.dtype}; "
                    "blocks must write the same shapes and types for every microbatch"
                )
            else:
                way = _way_of(value, target)
                ways.append(way)
                strides += value.stride()
                (target.as_strided(value.shape, value.stride()) if way == _DENSE else target).copy_(value)
        header = self.layout.header
        content_of = (*self.layout.identity(serial), *ways, *strides)
        if self._memory is not None:
            header.pack_into(self._memory, 0, *content_of)
        else:
            content = bytearray(header.pack(*content_of))
            self.buffer[: len(content)].copy_(torch.frombuffer(content, dtype=torch.uint8))

    def unpack(self, serial: int) -> dict[str, Tensor]:
        """Return the values that are there, as new tensors on the message's memory.

        On a GPU this waits until the message is there, as the executor does anyway before it goes on.

        Raises:
            TransportError: the message is not the one that was waited for.
        """
        layout = self.layout
        header, num_values = layout.header, len(layout.specs)
        memory = self.buffer[: header.size].cpu().numpy().data if self._memory is None else self._memory
        channel, number, agreement, *rest = header.unpack_from(memory)
        if (channel, number, agreement) != (expected := layout.identity(serial)):
            raise TransportError(
                f"expected message (channel, serial, layout) {expected} but received {(channel, number, agreement)}; "
                "all ranks must run the same version, configuration and data"
            )
        ways, strides = rest[:num_values], layout.split_strides(rest[num_values:])
        return {
            name: _as_sent(view, way, stride)
            for (name, view), way, stride in zip(self.values.items(), ways, strides, strict=True)
            if way != _MISSING
        }


def _way_of(value: Tensor, target: Tensor) -> int:
    """Return how `value` lies in memory, for the header; `target` is contiguous."""
    # Not value.is_contiguous(): that looks away from dimensions of size 1, which kernels do not.
    if value.stride() == target.stride() or not value.numel():
        return _CONTIGUOUS
    return _DENSE if is_dense(value) else _SPREAD


def _as_sent(view: Tensor, way: int, stride: tuple[int, ...]) -> Tensor:
    """Return a value as a tensor that lies as the sender's did."""
    if way == _DENSE:
        view = view.as_strided(view.shape, stride)
    elif way == _SPREAD:
        return laid_out(view, stride)
    # With .data each has a version counter of its own: changing one in place is no change of the others.
    return view.data


def _aligned(num_bytes: int, grain: int) -> int:
    return -(-num_bytes // grain) * grain
