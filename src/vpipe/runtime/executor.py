"""One executor for every schedule: take the rank's list of actions, one after another, through a dispatch table."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vpipe.model.chain import ValueSpec
from vpipe.model.nested import map_tensors, tensors_of
from vpipe.model.rng import RandomState
from vpipe.runtime.comm.transport import Transport
from vpipe.runtime.feed import BatchFeed
from vpipe.runtime.hooks import Record
from vpipe.runtime.memory.host_link import HostLink
from vpipe.runtime.memory.storages import sizes_of
from vpipe.runtime.memory_watch import MemoryWatch
from vpipe.runtime.programs import Program
from vpipe.runtime.stage.key import MicrobatchKey
from vpipe.runtime.stage.split import tell_split
from vpipe.runtime.stage.stage import Stage
from vpipe.runtime.weights.movable_versions import MovableVersions
from vpipe.runtime.weights.weights import WeightVersions
from vpipe.schedule.action import Action, Kind

__all__ = ["Executor", "HeldStage"]


@dataclass
class HeldStage:
    """A stage on this rank, with its weights."""

    stage: Stage
    weights: WeightVersions


@dataclass(frozen=True)
class _Prepared:
    """What a forward needs besides its inputs."""

    modules: nn.ModuleList
    fields: Mapping[str, Any]
    num_samples: int
    key: MicrobatchKey
    totals: Mapping[str, float]


_OF_WEIGHTS = frozenset({Kind.STEP, Kind.OFFLOAD_V, Kind.FETCH_V})
"""What is done whether or not the microbatch that it stands at has samples."""


class Executor:
    """Runs programs on the stages that this rank holds.

    `update(stage, microbatch)` is called for every STEP. On the rank of the last stage, `losses` holds the parts of
    each microbatch's loss, and `told` is called with a batch when all of its losses are there; in evaluation these are
    sums, and `counts` what they have to be divided by. `outputs` holds what the last block wrote, where a program keeps
    that. `link` is where OFFLOAD and FETCH move activations; only a stage that swaps needs one. `watch` keeps the
    rank's ledger.
    """

    def __init__(
        self,
        held: Mapping[int, HeldStage],
        rank_of: Callable[[Action], int],
        transport: Transport,
        update: Callable[[int, int], None],
        told: Callable[[int], None],
        record: Record,
        *,
        seed: int,
        link: HostLink | None = None,
        watch: MemoryWatch | None = None,
        synchronise: bool = False,
    ) -> None:
        self._held = held
        self._rank_of = rank_of
        self._transport = transport
        self._update = update
        self._tell_losses = told
        self._record = record
        self._seed = seed
        self._link = link
        self._watch = watch
        self._watching: MemoryWatch | None = None
        self._synchronise = synchronise
        self._arrived: dict[tuple[Kind, int, int], Mapping[str, Tensor]] = {}
        self._leaving: dict[tuple[Kind, int, int], Mapping[str, Tensor]] = {}
        self._prepared: dict[tuple[int, int], _Prepared] = {}
        self._expected: dict[int, Mapping[int, Sequence[ValueSpec]]] = {}
        self._totals: tuple[int, dict[str, float]] | None = None
        self._callers: RandomState | None = None
        self._told: set[int] = set()
        self._num_losses: Counter[int] = Counter()
        self.losses: dict[int, dict[str, Tensor]] = {}
        self.counts: dict[int, dict[str, float]] = {}
        self.outputs: dict[int, dict[str, Any]] = {}
        self._dispatch: dict[Kind, Callable[[Action], None]] = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.I: self._backward,
            Kind.W: self._backward_weights,
            Kind.R: self._recompute,
            Kind.OFFLOAD: self._offload,
            Kind.FETCH: self._fetch,
            Kind.OFFLOAD_V: self._offload_version,
            Kind.FETCH_V: self._fetch_version,
            Kind.SEND_F: self._send,
            Kind.SEND_B: self._send,
            Kind.RECV_F: self._receive,
            Kind.RECV_B: self._receive,
            Kind.STEP: self._step,
        }

    def forget(self) -> None:
        """Drop all that is in flight, after a program that did not get to its end."""
        for waiting in (self._arrived, self._leaving, self._prepared, self._num_losses, self.losses, self.counts):
            waiting.clear()
        self.outputs.clear()
        for held in self._held.values():
            held.stage.forget()
            held.weights.forget_gradients()

    def take_outputs(self, serials: Iterable[int]) -> list[dict[str, Any]]:
        """Move what was kept of these microbatches to the caller."""
        return [self.outputs.pop(serial) for serial in serials if serial in self.outputs]

    def run(self, program: Program, feed: BatchFeed) -> Iterator[Action]:
        """Execute a program; yield each update's action after it was done.

        A batch of fewer samples than microbatches leaves the last of them out, on every rank: what is to be done for
        them is not done, and an update that has none changes no weights. The others keep their order.
        Whoever lets the caller's own code run then, does so in `callers_turn`.
        """
        self._program, self._feed = program, feed
        self._totals = None
        for index, held in self._held.items() if program.training else ():
            held.weights.start(program.weights[index].version_of)
        dispatch, record, clock = self._dispatch, self._record, time.perf_counter_ns
        self._callers = RandomState()
        self._watching = None
        watch = self._watch
        if watch is not None and (watch.covers(program.first_iteration) if program.training else watch.ledger.limit):
            self._watching = watch
            self._watching.start()
        try:
            # A batch's last microbatch says it of the batch; of those to come it is not known yet.
            may_lack = program.training and (program.num_batches > 1 or not feed.has(program.num_microbatches - 1))
            for action in program.actions:
                start = clock()
                if may_lack and action.kind not in _OF_WEIGHTS and not feed.has(action.microbatch):
                    self._leave_out(action)
                    continue
                if self._watching is None:
                    dispatch[action.kind](action)
                else:
                    self._run_watched(self._watching, action)
                if self._synchronise:
                    # A device's time is only known once it has done the work.
                    torch.cuda.current_stream().synchronize()
                record(action, start, clock())
                if action.kind is Kind.STEP:
                    yield action
        finally:
            if self._callers is not None:
                self._callers.restore()

    def _leave_out(self, action: Action) -> None:
        """Pass over what there are no samples for; the weights that a backward would have used are used no more."""
        if action.kind in (Kind.B, Kind.W):
            self._held[action.stage].weights.accumulate(self._version(action), _do_nothing)

    def _run_watched(self, watch: MemoryWatch, action: Action) -> None:
        handler, program = self._dispatch[action.kind], self._program
        watch.expect(self._feed.crossing(action.microbatch))
        batch, position = divmod(action.microbatch, program.num_microbatches)
        if not program.training:
            watch.run_evaluation(handler, action, self._handed_over)
        elif watch.covers(program.first_iteration + batch):
            watch.run(handler, action, program.first_iteration + batch, position, self._handed_over)
        else:
            watch.stop()
            self._watching = None
            handler(action)

    @property
    def _is_noting(self) -> bool:
        return self._watching is not None and self._watching.is_noting

    def _handed_over(self) -> Iterator[Tensor]:
        for values in (*self._arrived.values(), *self._leaving.values(), *self.outputs.values()):
            yield from tensors_of(values)

    @contextmanager
    def callers_turn(self) -> Iterator[None]:
        """Run the caller's own code in the middle of a program.

        Blocks are seeded one by one. The caller's random numbers go on as if nothing had happened: a batch that is
        drawn from them must be the same on ranks that run other blocks.
        """
        if self._callers is not None:
            self._callers.restore()
        self._callers = None
        yield
        self._callers = RandomState()

    def _prepare(self, action: Action) -> _Prepared:
        held, serial, program = self._held[action.stage], action.microbatch, self._program
        key = MicrobatchKey(self._seed, *program.place_of(serial))
        key.prepare(range(held.stage.start, held.stage.stop))
        fields, num_samples = self._feed.rows(serial, held.stage.fields)
        if not program.training:
            return _Prepared(held.weights.for_forward(), fields, num_samples, key, {})
        modules = held.weights.for_forward(program.weights[action.stage].version_of[serial])
        totals = self._totals_of(serial, held.stage) if held.stage.is_last else {}
        return _Prepared(modules, fields, num_samples, key, totals)

    def _forward(self, action: Action) -> None:
        stage, serial = self._held[action.stage].stage, action.microbatch
        inputs = self._arrived.pop((Kind.F, action.stage, serial), {})
        ready = self._prepared.pop((action.stage, serial), None) or self._prepare(action)
        crossing = self._feed.crossing(serial)
        if self._expected.get(action.stage) is not crossing:
            stage.expect(crossing.get(action.stage, ()), crossing.get(action.stage + 1, ()))
            self._expected[action.stage] = crossing
        if self._program.training:
            outputs = stage.forward(
                serial, ready.modules, inputs, ready.fields, ready.key, self._program.split, self._is_noting
            )
            if stage.is_last:
                self.losses[serial] = stage.loss(serial, outputs, ready.totals, ready.num_samples)
                if self._program.keeps_outputs:
                    self._keep_outputs(stage, serial, outputs, inputs, ready)
                self._count_loss(serial)
        else:
            outputs = stage.evaluate(ready.modules, inputs, ready.fields, ready.key)
            if stage.is_last and self._program.keeps_outputs:
                self._keep_outputs(stage, serial, outputs, inputs, ready)
            elif stage.is_last:
                self._evaluate_loss(stage, serial, outputs, ready)
        if not stage.is_last:
            self._hand_over(Kind.F, action.stage, action.stage + 1, serial, outputs)
        self._feed.done(serial)

    def _keep_outputs(
        self, stage: Stage, serial: int, values: Mapping[str, Any], inputs: Mapping[str, Tensor], ready: _Prepared
    ) -> None:
        # What lies in a message, a batch or a weight is copied: that memory is given back, or written to.
        others = (*inputs.values(), *tensors_of(ready.fields), *ready.modules.parameters(), *ready.modules.buffers())
        places = sizes_of(others).keys()

        def own(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            return tensor if places.isdisjoint(sizes_of((tensor,))) else tensor.clone()

        self.outputs[serial] = {name: map_tensors(own, values[name]) for name in stage.chain.output_names}

    def _count_loss(self, serial: int) -> None:
        batch = serial // self._program.num_microbatches
        self._num_losses[batch] += 1
        if self._num_losses[batch] == self._feed.count(batch):
            del self._num_losses[batch]
            self._tell_losses(batch)

    def _evaluate_loss(self, stage: Stage, serial: int, values: Mapping[str, Tensor], ready: _Prepared) -> None:
        self.counts[serial] = stage.chain.loss.count(ready.fields, ready.num_samples)
        totals = dict.fromkeys(self.counts[serial], 1.0)
        self.losses[serial] = stage.evaluate_loss(values, totals, ready.num_samples, ready.key)

    def _totals_of(self, serial: int, stage: Stage) -> dict[str, float]:
        """Return the target counts of all microbatches whose gradients go into the same update."""
        size = self._program.update_size
        update = serial // size
        if self._totals is None or self._totals[0] != update:
            totals: dict[str, float] = {}
            for microbatch in filter(self._feed.has, range(update * size, (update + 1) * size)):
                for name, count in stage.chain.loss.count(*self._feed.rows(microbatch, stage.fields)).items():
                    totals[name] = totals.get(name, 0.0) + count
            self._totals = update, totals
        return self._totals[1]

    def _backward(self, action: Action) -> None:
        held, serial = self._held[action.stage], action.microbatch
        arrived = self._arrived.pop((Kind.B, action.stage, serial), {})
        version = self._program.weights[action.stage].version_of[serial]
        gradients = held.weights.accumulate(
            version, lambda: held.stage.backward(serial, arrived), is_last_use=not self._program.split
        )
        if self._program.split and action.stage not in self._told:
            self._tell_split(held, action)
        if action.kind is Kind.B and self._program.split:
            self._backward_weights(action)
        if action.stage > 0:
            self._hand_over(Kind.B, action.stage, action.stage - 1, serial, gradients)

    def _tell_split(self, held: HeldStage, action: Action) -> None:
        self._told.add(action.stage)
        version = self._program.weights[action.stage].version_of[action.microbatch]
        tell_split(action.stage, held.weights.trained(version), held.stage.deferred(action.microbatch))

    def _backward_weights(self, action: Action) -> None:
        held, serial = self._held[action.stage], action.microbatch
        version = self._program.weights[action.stage].version_of[serial]
        held.weights.accumulate(version, lambda: held.stage.backward_weights(serial))

    def _recompute(self, action: Action) -> None:
        held = self._held[action.stage]
        held.weights.modules(self._version(action))  # waits where they are in host memory
        held.stage.recompute(action.microbatch)

    def _offload(self, action: Action) -> None:
        parcels = self._held[action.stage].stage.pack_up(action.microbatch)
        if parcels and self._link is not None:
            self._link.offload((action.stage, action.microbatch), parcels)

    def _fetch(self, action: Action) -> None:
        parcels = self._held[action.stage].stage.parcels(action.microbatch)
        if parcels and self._link is not None:
            self._link.fetch((action.stage, action.microbatch), parcels)

    def _offload_version(self, action: Action) -> None:
        weights = self._held[action.stage].weights
        if isinstance(weights, MovableVersions):
            weights.offload(self._version(action))

    def _fetch_version(self, action: Action) -> None:
        weights = self._held[action.stage].weights
        if isinstance(weights, MovableVersions):
            weights.fetch(self._version(action))

    def _version(self, action: Action) -> int:
        return self._program.weights[action.stage].version_of[action.microbatch]

    def _hand_over(self, kind: Kind, source: int, target: int, serial: int, values: Mapping[str, Tensor]) -> None:
        # Neighbours on one rank need no message.
        if self._rank_of(Action(source, kind, serial)) == self._rank_of(Action(target, kind, serial)):
            self._arrived[kind, target, serial] = values
        else:
            self._leaving[kind, source, serial] = values

    def _send(self, action: Action) -> None:
        kind = Kind.F if action.kind is Kind.SEND_F else Kind.B
        self._transport.send(action, self._leaving.pop((kind, action.stage, action.microbatch)))

    def _receive(self, action: Action) -> None:
        if action.kind is Kind.RECV_F:
            # Its inputs are on their way; what the forward needs besides them can be got ready meanwhile.
            self._prepared[action.stage, action.microbatch] = self._prepare(action)
        kind = Kind.F if action.kind is Kind.RECV_F else Kind.B
        self._arrived[kind, action.stage, action.microbatch] = self._transport.receive(action)

    def _step(self, action: Action) -> None:
        size = self._program.update_size
        if self._feed.has(action.microbatch // size * size):
            self._update(action.stage, action.microbatch)
        else:
            self._held[action.stage].weights.step(apply=False)


def _do_nothing() -> None:
    """Stand for the backward of a microbatch that has no samples."""
