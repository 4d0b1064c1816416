"""Keeps a rank's ledger while a program runs: looks, after every action, at what the action changed.

This takes time, so by default it is done for the first batches alone: a synchronous pipeline repeats its batch, and an
asynchronous one has reached its steady state by then. With a memory limit it never ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from vpipe.runtime.host_link import Owner
from vpipe.runtime.ledger import Ledger
from vpipe.runtime.stage import Stage
from vpipe.runtime.swap import Parcel
from vpipe.runtime.transport import Transport
from vpipe.runtime.weights import WeightVersions
from vpipe.runtime.workspace import WorkspaceMeter
from vpipe.schedule.action import Action, Kind

__all__ = ["MemoryWatch", "WatchMode"]

WatchMode = Literal["first", "all"]

_LEAVING = frozenset({Kind.F, Kind.R, Kind.B, Kind.I, Kind.W, Kind.OFFLOAD})
"""After these a stage holds other activations than before."""
_GRADIENTS = frozenset({Kind.B, Kind.I, Kind.W, Kind.STEP})


class MemoryWatch:
    """Enters into `ledger` what the stages of a rank hold during the first `num_iterations` (None: for ever)."""

    def __init__(
        self,
        ledger: Ledger,
        stages: Mapping[int, tuple[Stage, WeightVersions]],
        transport: Transport,
        device: torch.device,
        num_iterations: int | None,
    ) -> None:
        self.ledger = ledger
        self._stages = stages
        self._transport = transport
        self._meter = WorkspaceMeter(device)
        self._num_iterations = num_iterations
        self._is_on = False
        for index, (_, weights) in stages.items():
            weights.resized = partial(self._resized, index)

    def covers(self, iteration: int) -> bool:
        """Tell whether a batch, by the number of those before it, is watched."""
        return self._num_iterations is None or iteration < self._num_iterations

    def start(self) -> None:
        """Enter what is there before a program: weights, and whatever earlier ones left."""
        self._is_on = True
        for index, (_, weights) in self._stages.items():
            self.ledger.put("versions", index, weights.older_bytes())
            self._enter_weights(index, weights)
            self._enter_gradients(index, weights)

    def stop(self) -> None:
        """Look no more until the next start."""
        self._is_on = False

    def run(
        self, handler: Callable[[Action], None], action: Action, handed_over: Callable[[], Iterable[Tensor]]
    ) -> None:
        """Do an action and enter what it changed; `handed_over` gives the values on their way between stages.

        Raises:
            MemoryLimitError: the rank held more than its limit.
        """
        before = self.ledger.now.total
        self._meter.run(handler, action)
        stage, _ = self._stages[action.stage]
        owner = action.stage, action.microbatch
        if action.kind in _LEAVING:
            held = stage.held(action.microbatch)
            if action.kind in (Kind.B, Kind.I):
                self.ledger.replace((owner, "parcels"), {})
            self.ledger.replace(owner, held)
        if action.kind in _GRADIENTS:
            # All stages of a rank may be updated at the last one's STEP.
            for index in self._stages if action.kind is Kind.STEP else [action.stage]:
                self._enter_gradients(index, self._stages[index][1])
        if action.kind is Kind.STEP:
            for index, (_, each) in self._stages.items():
                self._enter_weights(index, each)
        self.ledger.put("buffers", "messages", self._messages(handed_over()))
        self.ledger.settle(str(action), self._meter.excess(action, self.ledger.now.total - before))

    def moved(self, owner: Owner, parcel: Parcel, comes: bool) -> None:
        """Enter that a parcel is packed up or comes back, or leaves; called on whatever thread moves it."""
        key = owner, "parcels"
        if not self._is_on:
            return
        if not comes:
            self.ledger.release(key, parcel.place)
        elif parcel.host is None:
            self.ledger.hold(key, parcel.place, parcel.num_bytes)
        else:
            parcel.place = self.ledger.hold_new(key, parcel.num_bytes)

    def _resized(self, stage: int, num_bytes: int, *, by_link: bool = False) -> None:
        """Enter that the weight versions of a stage take more or less; called on whatever thread does that."""
        if self._is_on:
            self.ledger.add("versions", stage, num_bytes)

    def _enter_weights(self, index: int, weights: WeightVersions) -> None:
        self.ledger.put("parameters", index, num_bytes(weights.parameters))
        self.ledger.put("optimizer", index, num_bytes(weights.optimizer_state()))
        self.ledger.put("buffers", index, num_bytes(weights.untrained()))

    def _enter_gradients(self, index: int, weights: WeightVersions) -> None:
        self.ledger.put("gradients", index, num_bytes(item for item in weights.gradients() if item is not None))

    def _messages(self, handed_over: Iterable[Tensor]) -> int:
        places = self._transport.memory()
        for tensor in handed_over:
            storage = tensor.untyped_storage()
            places[storage.data_ptr()] = storage.nbytes()
        return sum(size for place, size in places.items() if not self.ledger.is_held(place))


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Add up the storages under `tensors`, each once."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
