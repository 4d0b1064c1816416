"""One message: all values that cross a cut for one microbatch, packed into flat bytes behind a header.

The header carries what the message is (cut and direction, serial number), a hash of the agreed names, shapes and types,
and which values are there, so that the receiver knows that it got what it waited for, instead of trusting the order of
arrival.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vpipe.errors import TransportError
from vpipe.model.chain import ValueSpec
from vpipe.model.rng import derive_seed
from vpipe.runtime.buffers import ALIGNMENT

__all__ = ["MessageLayout"]


class MessageLayout:
    """Where each value lies in a message; equal on both sides because both derive it from the same specs."""

    def __init__(self, channel: int, specs: Sequence[ValueSpec]) -> None:
        self.specs = tuple(specs)
        self._channel = channel
        self._agreement = derive_seed(*(str((spec.name, spec.shape, spec.dtype)) for spec in specs))
        # Channel, serial number, agreement; then for each value whether it is there.
        self._header = struct.Struct(f"<3q{len(self.specs)}?")
        self._places: list[slice] = []
        end = _aligned(self._header.size)
        for spec in specs:
            self._places.append(slice(end, end + spec.num_bytes))
            end = _aligned(end + spec.num_bytes)
        self.num_bytes = end if self.specs else 0

    def pack(self, buffer: Tensor, serial: int, values: Mapping[str, Tensor]) -> None:
        """Write `values` into `buffer`; one that is missing, such as a gradient that is zero everywhere, is marked so.

        Raises:
            TransportError: a value does not have the agreed shape or type.
        """
        for spec, target in zip(self.specs, self._views(buffer), strict=True):
            value = values.get(spec.name)
            if value is None:
                target.zero_()
            elif tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
                raise TransportError(
                    f"'{spec.name}' was agreed as {spec.shape} {spec.dtype} but is {tuple(value.shape)} {value.dtype}; "
                    "blocks must write the same shapes and types for every microbatch"
                )
            else:
                target.copy_(value)
        present = [values.get(spec.name) is not None for spec in self.specs]
        if buffer.device.type == "cpu":
            # Several times as quick as tensor operations, and on the path of every message.
            self._header.pack_into(buffer.numpy().data, 0, *self._identity(serial), *present)
        else:
            header = self._header.pack(*self._identity(serial), *present)
            buffer[: len(header)].copy_(torch.frombuffer(bytearray(header), dtype=torch.uint8))

    def unpack(self, buffer: Tensor, serial: int) -> dict[str, Tensor]:
        """Return views of the values that are in `buffer`, which is host memory.

        Raises:
            TransportError: the message is not the one that was waited for.
        """
        (*found,) = self._header.unpack_from(buffer.numpy().data)
        identity, present = found[:3], found[3:]
        if identity != (expected := self._identity(serial)):
            raise TransportError(
                f"expected message (channel, serial, layout) {tuple(expected)} but received {tuple(identity)}; "
                "all ranks must run the same version, configuration and data"
            )
        return {name: view for (name, view), there in zip(self.views(buffer).items(), present, strict=True) if there}

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return views of all values without looking at the header, which would make a GPU wait; missing ones are 0."""
        return {spec.name: view for spec, view in zip(self.specs, self._views(buffer), strict=True)}

    def _identity(self, serial: int) -> list[int]:
        return [self._channel, serial, self._agreement]

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[place].view(spec.dtype).view(spec.shape)
            for spec, place in zip(self.specs, self._places, strict=True)
        ]


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
