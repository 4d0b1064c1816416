"""One stage: the forward and the backward of one microbatch through a range of blocks.

Weights are passed in, so the same stage serves every weight version.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from vpipe.errors import ModelError
from vpipe.model.block import nests_of, split_written
from vpipe.model.chain import Chain, ValueSpec, call_block
from vpipe.model.loss import sum_parts
from vpipe.model.nested import Nest, take_apart, tensors_of
from vpipe.runtime.memory.storages import sizes_of
from vpipe.runtime.memory.swap import Parcel
from vpipe.runtime.stage.activations import Activations
from vpipe.runtime.stage.entry import Entrance, enter_as_leaves, enter_through_nodes
from vpipe.runtime.stage.findings import Findings, RunAgain
from vpipe.runtime.stage.key import MicrobatchKey
from vpipe.runtime.stage.metrics import Metrics
from vpipe.runtime.stage.roots import edge_of, one_or_nan
from vpipe.runtime.stage.split import (
    Deferred,
    DeferWeightGradients,
    blocks_with_unseen_uses,
    held_tensors,
    run_deferred,
)
from vpipe.runtime.stage.state import Snapshot

__all__ = ["Stage"]

T = TypeVar("T")

_WHOLE = nullcontext()


@dataclass
class _Saved:
    """What a forward leaves for its backward, and where the outputs' graphs begin."""

    key: MicrobatchKey
    entrance: Entrance
    activations: Activations
    deferred: Deferred | None
    """Where the weight gradients of a split backward are noted; None for a full backward."""
    roots: dict[str, GradientEdge] = field(default_factory=dict)
    loss: tuple[GradientEdge, Tensor] | None = None


class Stage:
    """Blocks `start` to `stop - 1` of a chain.

    `recomputes(block, microbatch)` says which blocks keep no activations for a microbatch (by its index in the batch),
    `swaps` names those whose activations can be moved to host memory between forward and backward.

    Forward and backward use the default random generators and leave them changed.
    """

    def __init__(
        self,
        chain: Chain,
        start: int,
        stop: int,
        recomputes: Callable[[int, int], bool] = lambda block, microbatch: False,
        swaps: Container[int] = (),
    ) -> None:
        self.chain = chain
        self.start = start
        self.stop = stop
        self.is_last = stop == len(chain)
        self.outputs = () if self.is_last else chain.crossing(stop)
        self.fields = chain.fields_of(start, stop)
        self._read_elsewhere = _fields_read_outside(chain, start, stop) | set(chain.whole_fields)
        self._aliases: dict[str, str] = {}
        self._same_inputs: dict[str, str] = {}
        self._same_outputs: dict[str, str] = {}
        self._nests_of_inputs: Mapping[str, Nest] = {}
        self._nests_of_outputs: Mapping[str, Nest] = {}
        self._recomputes = recomputes
        self._swaps = frozenset(block for block in range(start, stop) if block in swaps)
        self._enter = enter_through_nodes if self._swaps else enter_as_leaves
        self._differentiable: frozenset[str] = frozenset()
        self._owed: frozenset[str] = frozenset()
        self._saved: dict[int, _Saved] = {}
        self._deferred: dict[int, Deferred] = {}
        self._findings = Findings()
        self._metrics = Metrics(chain, self._findings)
        self._has_run = self._has_state = False
        self._shared: dict[int, Container[int]] = {}

    def expect(self, inputs: Sequence[ValueSpec], outputs: Sequence[ValueSpec]) -> None:
        """Say what shape inference found to cross the cuts before and after the stage: which values need a gradient."""
        self._same_inputs = {spec.name: spec.same_as for spec in inputs if spec.same_as is not None}
        self._same_outputs = {spec.name: spec.same_as for spec in outputs if spec.same_as is not None}
        self._differentiable = frozenset(spec.name for spec in inputs if spec.requires_grad)
        self._owed = frozenset(spec.name for spec in outputs if spec.requires_grad) - self._same_outputs.keys()
        self._aliases = {spec.name: spec.alias for spec in inputs if spec.alias is not None}
        self._nests_of_inputs, self._nests_of_outputs = nests_of(inputs), nests_of(outputs)

    @property
    def swaps(self) -> bool:
        """Tell whether any of its blocks swaps."""
        return bool(self._swaps)

    def look_again(self) -> None:
        """Find out anew how blocks have to be run: other weights are trained now."""
        self._findings, self._has_run = Findings(), False

    def forget(self) -> None:
        """Drop what forwards have left for backwards that will not come."""
        for waiting in (self._saved, self._deferred, self._shared):
            waiting.clear()

    @property
    def num_saved(self) -> int:
        """Count the microbatches whose activations are held."""
        return len(self._saved)

    def forward(
        self,
        serial: int,
        modules: nn.ModuleList,
        inputs: Mapping[str, Tensor],
        fields: Mapping[str, Tensor],
        key: MicrobatchKey,
        split: bool = False,
        is_watched: bool = False,
    ) -> dict[str, Tensor]:
        """Run microbatch `serial` and keep what its backward needs; return the values that cross the next cut.

        `inputs` become part of the stage's graph, so they are tensors that nobody else holds, and part of no graph. On
        the last stage return all values, for `loss`. With `split` its backward comes in two halves. Where it
        `is_watched`, `held` tells what memory it left.

        Raises:
            ModelError: a value needs a gradient although it did not when shapes were inferred, or the other way round.
        """
        delicate = self._delicate(fields, inputs)
        arrived = {name: value for name, value in inputs.items() if name not in self._same_inputs}
        entrance = self._enter(arrived, self._differentiable)
        entrance.values.update({name: entrance.values[other] for name, other in self._same_inputs.items()})

        deferred = Deferred(self._findings) if split else None
        is_first = not self._has_run

        def run() -> tuple[dict[str, Tensor], Activations]:
            activations = Activations(self._swaps, tensors_of(fields), is_watched=is_watched, findings=self._findings)
            activations.note(entrance.held())
            values = self._run(modules, self._entering(fields, entrance.values), key, deferred, activations)
            if split and is_first:
                for block in blocks_with_unseen_uses(tensors_of(values)) - self._findings.whole:
                    self._findings.add(self._findings.whole, block)
            return values, activations

        values, activations = self._run_again(run, modules) if split or is_watched else run()
        if delicate:
            self._check_changes(delicate)
        entrance.values = {}
        saved = self._saved[serial] = _Saved(key, entrance, activations, deferred)
        if self.is_last:
            return values
        activations.forget_needless()
        outputs = self._leaving(values)
        saved.roots = {name: edge_of(value) for name, value in outputs.items() if value.requires_grad}
        if odd := sorted(saved.roots.keys() ^ self._owed):
            needs = "needs" if odd[0] in saved.roots else "needs no"
            raise ModelError(
                f"'{odd[0]}' {needs} gradient where the stage of blocks {self.start} to {self.stop - 1} ends, unlike "
                "when shapes were inferred; blocks must not make that depend on data or device"
            )
        return {name: value.detach() for name, value in outputs.items()}

    def _delicate(self, fields: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[tuple[str, Tensor, int]]:
        """Return what must not be changed in place, as others would not see it, with how often it was so far."""
        if not self._read_elsewhere and not self._aliases:
            return []
        found = [(name, item) for name in self._read_elsewhere if name in fields for item in tensors_of(fields[name])]
        found += ((name, inputs[name]) for name in self._aliases if name in inputs)
        return [(name, item, item._version) for name, item in found if not item.is_inference()]

    def _check_changes(self, delicate: Sequence[tuple[str, Tensor, int]]) -> None:
        changed = next((name for name, tensor, version in delicate if tensor._version != version), None)
        if changed is None:
            return
        why = (
            f"which crosses a cut and has the same memory as '{self._aliases[changed]}' in front of it, not behind it"
            if changed in self._aliases
            else "a batch field that other microbatches get, too"
            if changed in self.chain.whole_fields
            else "a batch field that blocks of another stage read, too, which do not see that"
        )
        raise ModelError(
            f"blocks {self.start} to {self.stop - 1} change '{changed}' in place, {why}; let them change a copy "
            "(.clone()), or cut somewhere else"
        )

    def _run_again(self, run: Callable[[], T], modules: nn.ModuleList) -> T:
        """Run a forward, once more whenever it is found out that a block has to be run otherwise.

        That is found out with the first microbatch, before which all state is kept. Later that is so only where there
        is none; else the microbatch goes on as it is.
        """
        kept = None if self._has_run else Snapshot(modules)
        self._has_state = self._has_state or (kept is not None and kept.has_tensors)
        self._findings.may_repeat = not self._has_run or not self._has_state
        self._has_run = True
        while True:
            try:
                result = run()
            except RunAgain:
                if kept is not None:
                    kept.restore()
                continue
            self._findings.may_repeat = False
            return result

    def loss(
        self, serial: int, values: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        """Compute the parts of the microbatch's loss and make their sum the root of its backward; add the metrics.

        It keeps, recomputes or swaps what it needs as the last block does.
        """
        saved, block = self._saved[serial], self.chain.blocks[-1]
        others = {name: values[name] for name in self.chain.loss.inputs if name not in block.outputs}

        def call(written: Any) -> dict[str, Tensor]:
            return self._call_loss(saved.key, {**others, **split_written(block, written)}, totals, num_samples)

        written = tuple(values[name] for name in block.outputs)
        parts = saved.activations.around_loss(call, written if len(written) > 1 else written[0])
        saved.activations.forget_needless()
        metrics = self._metrics.take(parts)
        total = sum_parts(parts)
        if total.requires_grad:
            # One, or NaN where the loss is not finite: so every stage learns it with its gradients.
            saved.loss = edge_of(total), one_or_nan(total)
        metrics.update(self._metrics.measure(saved.key.seed_of, values, num_samples))
        return {name: part.detach() for name, part in parts.items()} | metrics

    def evaluate_loss(
        self, values: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int, key: MicrobatchKey
    ) -> dict[str, Tensor]:
        """Compute the parts of the loss, and the metrics, of what `evaluate` returned."""
        with torch.no_grad():
            parts = self._call_loss(key, values, totals, num_samples)
        return parts | self._metrics.measure(key.seed_of, values, num_samples)

    def _call_loss(
        self, key: MicrobatchKey, values: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        end = len(self.chain)
        call = partial(self._metrics.call_loss, values, totals, num_samples)
        return self._findings.run_seeded(end, key.seed_of, None, call)

    def evaluate(
        self, modules: nn.ModuleList, inputs: Mapping[str, Tensor], fields: Mapping[str, Tensor], key: MicrobatchKey
    ) -> dict[str, Tensor]:
        """Run one microbatch forward only; nothing is kept."""
        same = {name: inputs[other] for name, other in self._same_inputs.items()}
        with torch.no_grad():
            values = self._run(modules, self._entering(fields, {**inputs, **same}), key)
        return values if self.is_last else self._leaving(values)

    def _entering(self, fields: Mapping[str, Any], arrived: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return what the first block may read: what has arrived is put together."""
        nested = {name: nest.put_together(arrived) for name, nest in self._nests_of_inputs.items()}
        return {**fields, **arrived, **nested}

    def _leaving(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what crosses the next cut, taken apart; of a tensor with several names the first."""
        parts: dict[str, Tensor] = {}
        for name in self.outputs:
            if name in self._nests_of_outputs or not isinstance(values[name], Tensor):
                parts.update(self._taken_apart(name, values[name]))
            else:
                parts[name] = values[name]
        for name, other in self._same_outputs.items():
            if parts[name] is not parts[other]:
                raise ModelError(
                    f"'{name}' and '{other}' are not one tensor where the stage of blocks {self.start} to "
                    f"{self.stop - 1} ends, unlike when shapes were inferred; blocks must not make that depend on data "
                    "or device"
                )
            del parts[name]
        return parts

    def _taken_apart(self, name: str, value: Any) -> dict[str, Tensor]:
        tensors, nest = take_apart(name, value)
        if nest != (agreed := self._nests_of_outputs.get(name)):
            raise ModelError(
                f"'{name}' is {nest or 'a tensor'} where the stage of blocks {self.start} to {self.stop - 1} ends, and "
                f"was {agreed or 'a tensor'} when shapes were inferred. Of what crosses a cut only the numbers in "
                "tensors may change: let what changes be a tensor, or cut somewhere else"
            )
        return tensors

    def _run(
        self,
        modules: nn.ModuleList,
        values: dict[str, Tensor],
        key: MicrobatchKey,
        deferred: Deferred | None = None,
        activations: Activations | None = None,
    ) -> dict[str, Tensor]:
        for index, module in zip(range(self.start, self.stop), modules, strict=True):
            block = self.chain.blocks[index]
            noted = None if deferred is None or index in self._findings.whole else deferred
            call: Callable[..., Any] = partial(self._call_seeded, key, index, module, noted)
            if activations is not None:
                recomputes = self._recomputes(index, key.microbatch)
                call = activations.around(index, block.name, module, call, recomputes=recomputes)
            values.update(call_block(block, call, values))
        return values

    def _call_seeded(
        self, key: MicrobatchKey, block: int, module: nn.Module, deferred: Deferred | None, *inputs: Tensor
    ) -> Any:
        # Inside the call, so that a recomputed forward draws the same random numbers and is split in the same way.
        key.seed_block(block)
        if deferred is None and self._findings.draws_nothing(block, module):
            return module(*inputs)
        call = partial(_call, module, deferred, block, *inputs)
        return self._findings.run_seeded(block, key.seed_of, module, call)

    def recompute(self, serial: int) -> None:
        """Compute again, ahead of the backward, what the forward of microbatch `serial` left out."""
        self._saved[serial].activations.recompute()

    def pack_up(self, serial: int) -> list[Parcel]:
        """Return those activations of microbatch `serial` that can be moved to host memory now."""
        return self._saved[serial].activations.pack_up()

    def parcels(self, serial: int) -> list[Parcel]:
        """Return what was packed up of microbatch `serial`, in the order in which the backward will want it."""
        return self._saved[serial].activations.parcels()

    def held(self, serial: int) -> dict[int, int]:
        """Return place and bytes of every storage held for a watched microbatch, but for parcels and what is shared."""
        if serial in self._saved:
            return self._saved[serial].activations.held()
        return sizes_of(held_tensors(self._deferred.get(serial, [])), self._shared.get(serial, ()))

    def backward(self, serial: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the backward of microbatch `serial`, or its half for inputs; return the gradients of the stage's inputs.

        `gradients` are those of the stage's outputs; the last stage needs none. As in one process, what the loss does
        not depend on has no gradient, which is not the same as zero to an optimizer with weight decay or momentum.
        """
        saved = self._saved.pop(serial)
        if saved.loss is not None:
            roots, seeds = [saved.loss[0]], [saved.loss[1]]
        else:
            names = [name for name in saved.roots if name in gradients]
            roots, seeds = [saved.roots[name] for name in names], [gradients[name] for name in names]
        if roots:
            with _WHOLE if saved.deferred is None else saved.deferred.collecting():
                torch.autograd.backward(roots, seeds)
        if saved.deferred is not None:
            self._deferred[serial], self._shared[serial] = saved.deferred, saved.activations.shared
        return saved.entrance.gradients()

    def deferred(self, serial: int) -> Deferred:
        """Return the weight gradients that the first half of a split backward has left."""
        return self._deferred[serial]

    def backward_weights(self, serial: int) -> None:
        """Run the half for weights of a backward that was split."""
        del self._shared[serial]
        run_deferred(self._deferred.pop(serial))


def _fields_read_outside(chain: Chain, start: int, stop: int) -> frozenset[str]:
    """Return the batch fields that blocks `start` to `stop - 1` read and those of other stages, too."""
    others = {*chain.fields_of(0, start), *(chain.fields_of(stop, len(chain)) if stop < len(chain) else ())}
    return frozenset(others.intersection(chain.fields_of(start, stop)))


def _call(module: nn.Module, deferred: Deferred | None, block: int, *inputs: Tensor) -> Any:
    if deferred is None:
        return module(*inputs)
    with DeferWeightGradients(deferred, block):
        return module(*inputs)
