"""One message: all values that cross a cut for one microbatch, packed into flat bytes behind a header.

The header carries what the message is (cut and direction, serial number) and a hash of the agreed names, shapes and types, so that the
receiver knows that it got what it waited for, instead of trusting the order of arrival.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vpipe.errors import TransportError
from vpipe.model.chain import ValueSpec
from vpipe.model.rng import derive_seed

__all__ = ["MessageLayout"]

_ALIGNMENT = 64
_HEADER_BYTES = _ALIGNMENT


class MessageLayout:
    """Where each value lies in a message; equal on both sides because both derive it from the same specs."""

    def __init__(self, channel: int, specs: Sequence[ValueSpec]) -> None:
        self.specs = tuple(specs)
        self._channel = channel
        self._agreement = derive_seed(*(str((spec.name, spec.shape, spec.dtype)) for spec in specs))
        self._offsets: list[int] = []
        end = _HEADER_BYTES
        for spec in specs:
            self._offsets.append(end)
            end += -(-spec.num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = end if self.specs else 0

    def pack(self, buffer: Tensor, serial: int, values: Mapping[str, Tensor]) -> None:
        """Write `values` into `buffer`.

        Raises:
            TransportError: a value does not have the agreed shape or type.
        """
        for spec, target in zip(self.specs, self._views(buffer), strict=True):
            value = values[spec.name]
            if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
                raise TransportError(
                    f"'{spec.name}' was agreed as {spec.shape} {spec.dtype} but is {tuple(value.shape)} {value.dtype}; "
                    "blocks must write the same shapes for every microbatch"
                )
            target.copy_(value)
        buffer[:24].view(torch.int64).copy_(torch.tensor([self._channel, serial, self._agreement]))

    def unpack(self, buffer: Tensor, serial: int) -> dict[str, Tensor]:
        """Return views of the values in `buffer`.

        Raises:
            TransportError: the message is not the one that was waited for.
        """
        expected = [self._channel, serial, self._agreement]
        found = buffer[:24].view(torch.int64).tolist()
        if found != expected:
            raise TransportError(
                f"expected message (channel, serial, layout) {tuple(expected)} but received {tuple(found)}; "
                "all ranks must run the same version, configuration and data"
            )
        return self.views(buffer)

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return views of the values without looking at the header (which would make a GPU wait)."""
        return {spec.name: view for spec, view in zip(self.specs, self._views(buffer), strict=True)}

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[offset : offset + spec.num_bytes].view(spec.dtype).view(spec.shape)
            for spec, offset in zip(self.specs, self._offsets, strict=True)
        ]
