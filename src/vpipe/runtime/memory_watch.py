"""Keeps a rank's ledger while a program runs: looks, after every action, at what the action changed.

Batches repeat each other, so what a microbatch leaves on a stage is looked at in the first ones, until the pipeline has
reached its steady state, and in one of many after that; in between it is entered as it was seen last, which takes next
to no time. What may change by itself is looked at every time: messages, what the host link moves, weight versions. By
default the ledger is closed after the first batches; with a memory limit it is kept to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from threading import Lock
from typing import Literal, NamedTuple

from torch import Tensor

from vpipe.runtime.comm.transport import Transport
from vpipe.runtime.comm.world import World
from vpipe.runtime.memory.host_link import Owner
from vpipe.runtime.memory.ledger import Ledger
from vpipe.runtime.memory.storages import num_bytes, sizes_of
from vpipe.runtime.memory.swap import Parcel
from vpipe.runtime.memory.workspace import WorkspaceMeter
from vpipe.runtime.stage.stage import Stage
from vpipe.runtime.weights.weights import WeightVersions
from vpipe.schedule.action import COMMUNICATION, MOVES, Action, Kind

__all__ = ["MemoryWatch", "WatchMode"]

WatchMode = Literal["first", "all"]

_BACKWARDS = frozenset({Kind.B, Kind.I, Kind.W})
_TRAVELS = COMMUNICATION | MOVES
_LOOK_AGAIN = 32
"""Batches of which one is looked at closely."""


class _Remains(NamedTuple):
    """What an action leaves on its stage, in bytes."""

    activations: int
    """Of its microbatch, without messages."""
    gradients: int
    handed_over: int
    """Values on their way to another stage, that are no messages yet."""


class MemoryWatch:
    """Enters into `ledger` what the stages of a rank hold, until the batch `num_steady`, with a limit for ever."""

    def __init__(
        self,
        ledger: Ledger,
        stages: Mapping[int, tuple[Stage, WeightVersions]],
        transport: Transport,
        world: World,
        num_steady: int,
        *,
        for_ever: bool,
    ) -> None:
        self.ledger = ledger
        self._stages = stages
        self._transport = transport
        self._world = world
        self._meter = WorkspaceMeter(world.device, world.peak)
        self._meters: dict[int, WorkspaceMeter] = {}  # of evaluations, by the shapes of their microbatches
        self._shapes = 0
        self._device = world.device
        self._num_steady = num_steady
        self._for_ever = for_ever or ledger.limit is not None
        self._is_on = False
        self.is_noting = False
        """Whether a forward has to note what autograd saves."""
        self._noted: set[Owner] = set()
        self._remains: dict[tuple[int, Kind, int], _Remains] = {}
        self._remains_of: dict[int, dict[tuple[int, Kind, int], _Remains]] = {}
        for index, (_, weights) in stages.items():
            weights.resized = partial(self._resized, index)
        self._moving = Lock()
        self._num_bytes_brought = 0
        """By the host link, less what it has taken: what it changes while an action runs is not the action's doing."""

    def covers(self, iteration: int) -> bool:
        """Tell whether a batch, by the number of those before it, is watched."""
        return self._for_ever or iteration < self._num_steady

    def expect(self, shapes: object) -> None:
        """Say of which shapes the next batches are; equal ones are the same object, which lives on."""
        self._shapes = id(shapes)
        self._remains = self._remains_of.setdefault(self._shapes, {})

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

    def forget(self) -> None:
        """Drop what was entered for microbatches that are gone."""
        self.stop()
        self._noted.clear()
        self._meter = WorkspaceMeter(self._device, self._world.peak)
        self.ledger.forget_microbatches()

    def run(
        self,
        handler: Callable[[Action], None],
        action: Action,
        iteration: int,
        position: int,
        handed_over: Callable[[], Iterable[Tensor]],
    ) -> None:
        """Do an action for microbatch `position` of a batch, and enter what it changed.

        `handed_over` gives the values on their way between stages.

        Raises:
            MemoryLimitError: the rank held more than its limit.
        """
        owner, key = (action.stage, action.microbatch), (action.stage, action.kind, position)
        if action.kind is Kind.F and (self._stages[action.stage][0].swaps or self._is_due(key, iteration)):
            self._noted.add(owner)
        self.is_noting = owner in self._noted
        is_close = self._is_due(key, iteration) if action.kind is Kind.STEP else self.is_noting
        before = self._without_brought() if is_close else 0
        self._meter.run(handler, action, has_gradients=self.ledger.entry("gradients", action.stage) > 0)
        growth = 0
        if action.kind in _TRAVELS:
            self._enter_travels(owner, action.kind, handed_over())
        elif is_close:
            most = self._look(owner, key, handed_over())
            growth = max(most, self._without_brought()) - before
        else:
            self._enter_as_seen(owner, key)
        self.ledger.settle(str(action), self._meter.excess(growth))

    def run_evaluation(
        self, handler: Callable[[Action], None], action: Action, handed_over: Callable[[], Iterable[Tensor]]
    ) -> None:
        """Do an action of an evaluation, which keeps nothing, and enter what was on its way or needed for a moment.

        Raises:
            MemoryLimitError: the rank held more than its limit.
        """
        meter = self._meters.setdefault(self._shapes, WorkspaceMeter(self._device, self._world.peak))
        before = self._without_brought()
        meter.run(handler, action, has_gradients=False)
        self._enter_messages(self._transport.memory(), handed_over())
        growth = max(0, self._without_brought() - before)
        self.ledger.settle(f"{action} of an evaluation", meter.excess(growth))

    def _is_due(self, key: tuple[int, Kind, int], iteration: int) -> bool:
        return iteration < self._num_steady or iteration % _LOOK_AGAIN == 0 or key not in self._remains

    def _without_brought(self) -> int:
        with self._moving:
            return self.ledger.total - self._num_bytes_brought

    def _look(self, owner: Owner, key: tuple[int, Kind, int], handed_over: Iterable[Tensor]) -> int:
        """Enter what a computation changed, and remember what it left; return the most that was held meanwhile."""
        (index, kind, _), messages = key, self._transport.memory()
        stage, weights = self._stages[index]
        most, activations = 0, 0
        if kind is Kind.STEP:
            # All stages of a rank may be updated at the last one's STEP. Gradients outlive the optimizer's first state.
            for number, (_, each) in self._stages.items():
                self._enter_weights(number, each)
            most = self._without_brought()
            self._enter_all_gradients()
        else:
            held = stage.held(owner[1])
            if kind in (Kind.B, Kind.I):
                self.ledger.replace((owner, "parcels"), {})
            self.ledger.replace(owner, held)
            activations = sum(size for place, size in held.items() if place not in messages)
        if kind in _BACKWARDS:
            self._enter_gradients(index, weights)
        if kind in (Kind.B, Kind.W, Kind.STEP):
            self._noted.discard(owner)
        handed = self._enter_messages(messages, handed_over)
        self._remains[key] = _Remains(activations, self.ledger.entry("gradients", index), handed)
        return most

    def _enter_as_seen(self, owner: Owner, key: tuple[int, Kind, int]) -> None:
        if key[1] is Kind.STEP:
            self._enter_all_gradients()
            return
        activations, gradients, handed_over = self._remains[key]
        self.ledger.put("activations", owner, activations)
        self.ledger.put("gradients", key[0], gradients)
        self.ledger.put("buffers", "handed over", handed_over)

    def _enter_travels(self, owner: Owner, kind: Kind, handed_over: Iterable[Tensor]) -> None:
        if kind is Kind.OFFLOAD:
            self.ledger.replace(owner, self._stages[owner[0]][0].held(owner[1]))
        self._enter_messages(self._transport.memory(), handed_over)

    def _enter_messages(self, places: Mapping[int, int], handed_over: Iterable[Tensor]) -> int:
        """Enter messages, and values that are none yet; return the bytes of these. What is an activation counts so."""
        is_held = self.ledger.is_held
        others = sizes_of(handed_over, places)
        handed = sum(size for place, size in others.items() if not is_held(place))
        self.ledger.put("buffers", "messages", sum(size for place, size in places.items() if not is_held(place)))
        self.ledger.put("buffers", "handed over", handed)
        return handed

    def moved(self, owner: Owner, parcel: Parcel, comes: bool) -> None:
        """Enter that a parcel is packed up or comes back, or leaves; called on whatever thread moves it."""
        key = owner, "parcels"
        if not self._is_on:
            return
        with self._moving:
            if not comes:
                self.ledger.release(key, parcel.place)
                self._num_bytes_brought -= parcel.num_bytes
            elif parcel.host is None:
                self.ledger.hold(key, parcel.place, parcel.num_bytes)
            else:
                parcel.place = self.ledger.hold_new(key, parcel.num_bytes)
                self._num_bytes_brought += parcel.num_bytes
                self._meter.expect(parcel, parcel.num_bytes)

    def _resized(self, stage: int, num_bytes: int, *, by_link: bool = False) -> None:
        """Enter that the weight versions of a stage take more or less; called on whatever thread does that."""
        if self._is_on:
            with self._moving:
                self.ledger.add("versions", stage, num_bytes)
                self._num_bytes_brought += num_bytes if by_link else 0

    def _enter_weights(self, index: int, weights: WeightVersions) -> None:
        self.ledger.put("parameters", index, num_bytes(weights.parameters))
        self.ledger.put("optimizer", index, num_bytes(weights.optimizer_state()))
        self.ledger.put("buffers", index, num_bytes(weights.untrained()))

    def _enter_gradients(self, index: int, weights: WeightVersions) -> None:
        self.ledger.put("gradients", index, num_bytes(item for item in weights.gradients() if item is not None))

    def _enter_all_gradients(self) -> None:
        for index, (_, weights) in self._stages.items():
            self._enter_gradients(index, weights)
