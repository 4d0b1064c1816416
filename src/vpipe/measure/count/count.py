"""Count what every block of a chain does and holds for one microbatch, by running it on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from vpipe.errors import ModelError
from vpipe.measure.alike import block_signature
from vpipe.measure.count.kernels import Attention, DeviceKernels
from vpipe.measure.count.watch import Seen, Storages, Watch
from vpipe.model.block import ParameterRef, call_block
from vpipe.model.chain import Chain
from vpipe.model.infer import build_on_meta, leaf_of, specs_of
from vpipe.model.loss import sum_parts
from vpipe.model.nested import map_tensors, tensors_of
from vpipe.model.rng import seeded
from vpipe.planner.estimate.analytic import BlockWork, Operation

__all__ = ["Assumptions", "count_blocks", "count_kinds", "num_tied"]


@dataclass(frozen=True)
class Assumptions:
    """What cannot be known from shapes."""

    dtype: torch.dtype = torch.bfloat16
    """Of weights and activations."""
    attention: Attention = "flash"
    target_share: float = 0.15
    """Of a BERT's tokens, those that are masked."""


def count_blocks(chain: Chain, fields: Mapping[str, Tensor], assumptions: Assumptions) -> tuple[BlockWork, ...]:
    """Return what every block does and holds for one microbatch, `fields`; blocks that are alike are run once.

    Only shapes and types of `fields` matter. The loss counts with the last block.

    Raises:
        ModelError: a block cannot run on the meta device.
    """
    batch = {name: _on_meta(tensor, assumptions.dtype) for name, tensor in fields.items()}
    known: dict[str, tuple[BlockWork, dict[str, Any]]] = {}
    values: dict[str, Any] = {}
    works = []
    with seeded(0):
        for index, block in enumerate(chain.blocks):
            arriving = {name: map_tensors(leaf_of, values[name]) for name in chain.crossing(index)}
            signature = _signature(chain, index, arriving)
            if signature not in known:
                known[signature] = _Counter(chain, index, arriving, batch, assumptions).count()
            work, written = known[signature]
            if index < len(chain) - 1:
                values = {**arriving, **dict(zip(block.outputs, written.values(), strict=True))}
            works.append(replace(work, name=block.name, output_bytes=_crossing_bytes(chain, index + 1, values)))
    return tuple(_with_ties(chain, works))


def count_kinds(chain: Chain, works: Sequence[BlockWork]) -> int:
    """Count the blocks that are not like an earlier one."""
    return len({replace(work, name="", output_bytes=0, tied_parameters=0) for work in works})


def num_tied(chain: Chain, group: Sequence[ParameterRef]) -> int:
    """Return the size of the one weight that a tied group is."""
    return build_on_meta(chain.blocks[group[0].block]).get_parameter(group[0].name).numel()


def _signature(chain: Chain, index: int, arriving: Mapping[str, Any]) -> str:
    specs = {index: specs_of(arriving, {})}
    return f"{index == len(chain) - 1} {block_signature(chain, index, specs)}"


def _on_meta(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to("meta", dtype if tensor.is_floating_point() else None)


def _crossing_bytes(chain: Chain, cut: int, values: Mapping[str, Any]) -> int:
    if cut == len(chain):
        return 0
    crossing = tensors_of([values[name] for name in chain.crossing(cut)])
    return sum(tensor.numel() * tensor.itemsize for tensor in crossing)


def _with_ties(chain: Chain, works: Sequence[BlockWork]) -> list[BlockWork]:
    tied: Counter[int] = Counter()
    for group in chain.tied:
        for ref in group:
            tied[ref.block] += num_tied(chain, group)
    return [replace(work, tied_parameters=tied[index]) for index, work in enumerate(works)]


class _Counter:
    """Block `index` with what arrives at it."""

    def __init__(
        self, chain: Chain, index: int, arriving: Mapping[str, Any], batch: Mapping[str, Tensor], given: Assumptions
    ) -> None:
        self._chain, self._block, self._given = chain, chain.blocks[index], given
        self._is_last = index == len(chain) - 1
        self._going_on = set(chain.crossing(index + 1)) if not self._is_last else set()
        self._arriving, self._batch = arriving, batch
        self._module = build_on_meta(self._block).to("meta", given.dtype)
        for parameter in self._module.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        self._storages = Storages()

    def count(self) -> tuple[BlockWork, dict[str, Any]]:
        """Return what the block does and holds, and what it writes."""
        parameters, buffers = list(self._module.parameters()), list(self._module.buffers())
        trained = [item for item in parameters if item.requires_grad]
        frozen = [item for item in parameters if not item.requires_grad]
        storages = self._storages
        weights = storages.numbers(parameters)
        gradients = storages.numbers(item.grad for item in trained if item.grad is not None)
        run = _Run(self)
        whole = run.backward()
        first, later = _split(whole, _Run(self).input_backward(), weights)
        # Weights and batch fields are counted elsewhere, and outputs with the block that reads them.
        others = weights | storages.numbers([*buffers, *self._batch.values(), *tensors_of(run.written)])
        inputs = run.inputs
        held = (run.saved - others) | inputs
        made_later = {number for item in later for number in item.writes}
        waiting = {number for item in later for number in item.reads} - made_later - weights - gradients
        work = BlockWork(
            name=self._block.name,
            forward=_grouped(run.forward),
            input_grad=_grouped(first),
            weight_grad=_grouped(later),
            num_parameters=sum(item.numel() for item in trained),
            activation_bytes=storages.total(held),
            input_bytes=storages.total(inputs),
            output_bytes=0,
            input_grad_bytes=storages.total(held & {number for item in first for number in item.reads}),
            weight_grad_bytes=storages.total(waiting - storages.numbers(self._batch.values())),
            workspace_bytes=run.workspace_bytes,
            buffer_bytes=storages.total(storages.numbers([*frozen, *buffers])),
        )
        return work, {name: map_tensors(leaf_of, value) for name, value in run.written.items()}

    def call(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run the block, and the loss after the last one."""
        module = self._module
        try:
            written = call_block(self._block, module, values)
            if self._is_last:
                loss = self._chain.loss
                num_samples = len(next(iter(self._batch.values())))
                parts = loss({**values, **written}, dict.fromkeys(loss.parts, 1.0), num_samples)
                written = {"loss": sum_parts(parts)}
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise ModelError(
                f"block '{self._block.name}' cannot be counted on the meta device: {error}. Keep control flow that "
                "depends on data out of it"
            ) from error
        return written


class _Run:
    """One forward of a block, watched."""

    def __init__(self, counter: _Counter) -> None:
        self._storages = storages = counter._storages
        self._watch = Watch(storages, counter._given.target_share)
        self.leaves = {name: map_tensors(leaf_of, value) for name, value in counter._arriving.items()}
        read = counter._block.inputs + (counter._chain.loss.inputs if counter._is_last else ())
        self.inputs = storages.numbers(tensors_of([self.leaves[name] for name in read if name in self.leaves]))
        storages.numbers(counter._batch.values())
        self.saved: set[int] = set()
        storages.peak_bytes = storages.alive_bytes
        with saved_tensors_hooks(self._pack, lambda kept: kept), DeviceKernels(counter._given.attention), self._watch:
            self.written = counter.call({**counter._batch, **self.leaves})
        self.forward = list(self._watch.seen)
        self.workspace_bytes = storages.peak_bytes - storages.alive_bytes
        going = counter._going_on | {"loss"}
        leaving = tensors_of([value for name, value in self.written.items() if name in going])
        self._ends = [value for value in leaving if value.requires_grad]
        self._seeds = [torch.empty_like(value) for value in self._ends]

    def _pack(self, tensor: Tensor) -> Tensor:
        self.saved.add(self._storages.number(tensor))
        return tensor.detach()

    def backward(self) -> list[Seen]:
        """Run a full backward; return its operations."""
        self._watch.seen.clear()
        start = self._storages.peak_bytes = self._storages.alive_bytes
        if self._ends:
            with self._watch:
                torch.autograd.backward(self._ends, self._seeds)
        self.workspace_bytes = max(self.workspace_bytes, self._storages.peak_bytes - start)
        return list(self._watch.seen)

    def input_backward(self) -> list[Seen]:
        """Run the half that gives the gradients of the inputs; return its operations."""
        self._watch.seen.clear()
        wanted = [leaf for leaf in tensors_of(self.leaves) if leaf.requires_grad]
        if self._ends and wanted:
            with self._watch:
                torch.autograd.grad(self._ends, wanted, self._seeds, allow_unused=True)
        return list(self._watch.seen)


def _split(whole: Sequence[Seen], first: Sequence[Seen], weights: set[int]) -> tuple[list[Seen], list[Seen]]:
    """Part a backward's operations into those that the gradients of the inputs need, and the rest."""

    def key(item: Seen) -> tuple[object, ...]:
        return item.name, item.shapes, bool(weights.intersection(item.reads))

    left = Counter(map(key, first))
    needed, rest = [], []
    for item in whole:
        if left[key(item)]:
            left[key(item)] -= 1
            needed.append(item)
        else:
            rest.append(item)
    return needed, rest


def _grouped(seen: Sequence[Seen]) -> tuple[Operation, ...]:
    counts = Counter((item.name, item.flops, item.num_bytes) for item in seen)
    return tuple(Operation(*kind, count) for kind, count in counts.items())
