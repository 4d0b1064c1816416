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
from vpipe.model.nested import map_tensors, tensors_of
from vpipe.model.rng import RandomState
from vpipe.runtime.stage.findings import telling_refused_hooks
from vpipe.runtime.stage.state import ChangingState, Place, meeting

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

    def __init__(
        self, name: str, module: nn.Module, call: Callable[..., Any], state: ChangingState | None = None
    ) -> None:
        self._name = name
        self._module = module
        self._state = ChangingState(name) if state is None else state
        self._met: dict[Place, Any] = {}
        self._calls: list[Callable[..., Any]] = [call]
        self._inputs: tuple[Any, ...] = ()
        self._versions: tuple[int, ...] = ()
        self._places: list[weakref.ref[_Place]] = []
        self._is_running = self._was_asked = self._is_filled = False

    def run(self, *inputs: Any) -> Any:
        """Run the block for the first time."""
        self._inputs = tuple(map_tensors(_leaf, value) for value in inputs)
        self._versions = tuple(value._version for value in tensors_of(inputs))
        with self._running(), self._state.keeping(self._module, self._met):
            return self._calls[0](*inputs)

    def go_on(self, call: Callable[[Any], Any], result: Any) -> Any:
        """Run `call` on what the block returned; its activations are computed again together with the block's."""
        self._calls.append(call)
        with self._running():
            return call(result)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Leave out what is saved."""
        self._is_running = True
        try:
            with telling_refused_hooks(self._name, "computed again"), saved_tensors_hooks(self._leave_out, _take):
                yield
        finally:
            self._is_running = False
        if self._was_asked:
            self._was_asked = False
            for place in self._alive():
                place.tensor = None

    @property
    def is_needed(self) -> bool:
        """Tell whether anything was saved at all."""
        return bool(self._places)

    def tensors(self) -> Iterator[Tensor]:
        """Yield what is held now: the inputs and what the block's state was, or what was computed again."""
        yield from tensors_of(self._inputs)
        yield from (value for value in self._met.values() if isinstance(value, Tensor))
        for place in self._alive():
            if place.tensor is not None:
                yield place.tensor

    def _alive(self) -> Iterator[_Place]:
        for reference in self._places:
            if (place := reference()) is not None:
                yield place

    def fill(self) -> None:
        """Run the block again, unless that was done already, and forget its inputs.

        Where the first run itself has a backward that asks for what was saved, it goes on as if nothing had happened.

        Raises:
            ModelError: the second run is not like the first.
        """
        if self._is_running:
            self._was_asked = True
            state = RandomState()
            self._run_again()
            state.restore()
        elif not self._is_filled:
            self._is_filled = True
            self._run_again()
            self._calls, self._inputs, self._met = [], (), {}

    def _run_again(self) -> None:
        self._check_inputs()
        if not self._places:
            return
        filler = _Filler(self._name, self._places)
        inputs = tuple(map_tensors(_leaf, value) for value in self._inputs)
        try:
            with torch.enable_grad(), meeting(self._module, self._met), saved_tensors_hooks(filler.put, _as_it_is):
                result = self._calls[0](*inputs)
                for call in self._calls[1:]:
                    result = call(result)
        except _Enough:
            return
        except RuntimeError:
            # What is raised here comes out of a scripted module as an error of TorchScript's own.
            if filler.problem is not None:
                raise filler.problem from None
            if not filler.has_ended:
                raise
            return
        raise ModelError(
            f"block '{self._name}' saved {filler.count} tensors when it was computed again and {len(self._places)} "
            "before; a block that recomputes must do the same every time: let it keep its activations"
        )

    def _check_inputs(self) -> None:
        now = tuple(value._version for value in tensors_of(self._inputs))
        if now != self._versions:
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
        self.problem: ModelError | None = None
        """What is wrong with the second run."""

    @property
    def has_ended(self) -> bool:
        """Tell whether all that the first run saved is there."""
        return self.count == len(self._places)

    def put(self, tensor: Tensor) -> Tensor:
        """Return what the second run itself has saved, for a backward in it."""
        place = self._places[self.count]()
        self.count += 1
        if place is not None:
            if place.kind != (tensor.shape, tensor.dtype):
                (shape, dtype), found = place.kind, f"{tuple(tensor.shape)} {tensor.dtype}"
                self.problem = ModelError(
                    f"block '{self._name}' saved a tensor of {tuple(shape)} {dtype}, and of {found} when it was "
                    "computed again; a block that recomputes must do the same every time: let it keep its activations"
                )
                raise self.problem
            place.tensor = tensor.detach()
        if self.has_ended:
            raise _Enough
        return tensor.detach()


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.requires_grad)


def _take(place: _Place) -> Tensor:
    if place.tensor is None:
        place.owner.fill()
    assert place.tensor is not None
    return place.tensor


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
