"""Forwards that are run again: of a block's activations only its inputs are kept.

What autograd would save is left out, and made again by a second run of the block: when the backward first asks for any
of it, or before, by `fill`. The second run ends with the last thing that was saved, and every tensor lives until its
node of the graph has been used, as without recomputation.

The scheme is that of `torch.utils.checkpoint` (`use_reentrant=False`), which has no way to recompute ahead of time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from vpipe.errors import ModelError

__all__ = ["Recomputation"]


class _Place:
    """Stands in the graph for a tensor that is not there yet."""

    __slots__ = ("__weakref__", "kind", "owner", "tensor")

    def __init__(self, owner: Recomputation, tensor: Tensor) -> None:
        self.owner = owner
        self.kind = tensor.shape, tensor.dtype
        self.tensor: Tensor | None = None


class _Enough(Exception):
    """Ends a second run: all that was saved is there."""


class Recomputation:
    """One forward of the block called `name`, of which only the inputs are kept until `fill`.

    `call` runs `module`, and gives the same bits every time.
    """

    def __init__(self, name: str, module: nn.Module, call: Callable[..., Any]) -> None:
        self._name = name
        self._module = module
        self._calls: list[Callable[..., Any]] = [call]
        self._inputs: tuple[Tensor, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._places: list[weakref.ref[_Place]] = []
        self._is_filled = False

    def run(self, *inputs: Tensor) -> Any:
        """Run the block for the first time."""
        self._inputs = tuple(value.detach().requires_grad_(value.requires_grad) for value in inputs)
        self._versions = tuple(value._version for value in inputs)
        with saved_tensors_hooks(self._leave_out, _take):
            return self._calls[0](*inputs)

    def go_on(self, call: Callable[[Any], Any], result: Any) -> Any:
        """Run `call` on what the block returned; its activations are computed again together with the block's."""
        self._calls.append(call)
        with saved_tensors_hooks(self._leave_out, _take):
            return call(result)

    @property
    def is_needed(self) -> bool:
        """Tell whether anything was saved at all."""
        return bool(self._places)

    def tensors(self) -> Iterator[Tensor]:
        """Yield what is held now: the inputs, or what was computed again."""
        yield from self._inputs
        for reference in self._places:
            place = reference()
            if place is not None and place.tensor is not None:
                yield place.tensor

    def fill(self) -> None:
        """Run the block again, unless that was done already, and forget its inputs.

        Raises:
            ModelError: the second run is not like the first.
        """
        if self._is_filled:
            return
        self._is_filled = True
        calls, inputs = self._calls, self._inputs
        self._check_inputs()
        self._calls, self._inputs = [], ()
        if not self._places:
            return
        filler = _Filler(self._name, self._places)
        try:
            with torch.enable_grad(), _keeping_buffers(self._module), saved_tensors_hooks(filler.put, _take):
                result = calls[0](*inputs)
                for call in calls[1:]:
                    result = call(result)
        except _Enough:
            return
        raise ModelError(
            f"block '{self._name}' saved {filler.count} tensors when it was computed again and {len(self._places)} "
            "before; a block that recomputes must do the same every time: let it keep its activations"
        )

    def _check_inputs(self) -> None:
        if any(value._version != version for value, version in zip(self._inputs, self._versions, strict=True)):
            raise ModelError(
                f"an input of block '{self._name}' was changed in place, so the block cannot be computed again; let it "
                "keep its activations, or replace the in-place operation"
            )

    def _leave_out(self, tensor: Tensor) -> _Place:
        place = _Place(self, tensor)
        self._places.append(weakref.ref(place))
        return place


class _Filler:
    """Puts what a second run saves into the places of the first."""

    def __init__(self, name: str, places: list[weakref.ref[_Place]]) -> None:
        self._name = name
        self._places = places
        self.count = 0

    def put(self, tensor: Tensor) -> None:
        place = self._places[self.count]()
        self.count += 1
        if place is not None:
            if place.kind != (tensor.shape, tensor.dtype):
                (shape, dtype), found = place.kind, f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ModelError(
                    f"block '{self._name}' saved a tensor of {tuple(shape)} {dtype}, and of {found} when it was "
                    "computed again; a block that recomputes must do the same every time: let it keep its activations"
                )
            place.tensor = tensor.detach()
        if self.count == len(self._places):
            raise _Enough


def _take(place: _Place) -> Tensor:
    if place.tensor is None:
        place.owner.fill()
    assert place.tensor is not None
    return place.tensor


@contextmanager
def _keeping_buffers(module: nn.Module) -> Iterator[None]:
    """Undo what a second run does to buffers: running statistics have seen the microbatch already."""
    kept = [
        (part, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for part, name, buffer, value in kept:
            # As batch norm's own update does, this goes past autograd's version counter.
            buffer.data.copy_(value)
            part._buffers[name] = buffer
