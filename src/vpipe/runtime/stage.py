"""One stage: the forward and the backward of one microbatch through a range of blocks.

Weights are passed in, so the same stage serves every weight version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import checkpoint

from vpipe.errors import ModelError
from vpipe.model.chain import Chain, ValueSpec, call_block
from vpipe.model.loss import sum_parts
from vpipe.model.rng import derive_seed, seed_everything
from vpipe.runtime.split import Deferred, DeferWeightGradients, run_deferred

__all__ = ["MicrobatchKey", "Stage"]


@dataclass(frozen=True)
class MicrobatchKey:
    """Where in the training a microbatch is: everything its random numbers depend on, besides the block."""

    seed: int
    iteration: int
    microbatch: int

    def prepare(self, blocks: range) -> None:
        """Derive the seeds of `blocks` ahead of their use, while there is nothing else to do."""
        for block in blocks:
            _derive(self.seed, self.iteration, self.microbatch, block)

    def seed_block(self, block: int) -> None:
        """Set the random state in which `block` runs for this microbatch."""
        seed_everything(_derive(self.seed, self.iteration, self.microbatch, block))


@lru_cache(maxsize=4096)
def _derive(seed: int, iteration: int, microbatch: int, block: int) -> int:
    return derive_seed(seed, "dropout", iteration, microbatch, block)


@dataclass
class _Saved:
    """What a forward leaves for its backward: the inputs that need a gradient, and where the outputs' graphs begin."""

    inputs: dict[str, Tensor]
    deferred: Deferred | None
    """Where the weight gradients of a split backward are noted; None for a full backward."""
    roots: dict[str, GradientEdge] = field(default_factory=dict)
    loss: tuple[GradientEdge, Tensor] | None = None


class Stage:
    """Blocks `start` to `stop - 1` of a chain.

    `recomputes(block, microbatch)` says which blocks keep no activations for a microbatch (by its index in the batch).

    Forward and backward use the default random generators and leave them changed.
    """

    def __init__(
        self,
        chain: Chain,
        start: int,
        stop: int,
        recomputes: Callable[[int, int], bool] = lambda block, microbatch: False,
    ) -> None:
        self.chain = chain
        self.start = start
        self.stop = stop
        self.is_last = stop == len(chain)
        self.outputs = () if self.is_last else chain.crossing(stop)
        self.fields = chain.fields_of(start, stop)
        self._recomputes = recomputes
        self._differentiable: frozenset[str] = frozenset()
        self._owed: frozenset[str] = frozenset()
        self._saved: dict[int, _Saved] = {}
        self._deferred: dict[int, Deferred] = {}

    def expect(self, inputs: Sequence[ValueSpec], outputs: Sequence[ValueSpec]) -> None:
        """Say what shape inference found to cross the cuts before and after the stage: which values need a gradient."""
        self._differentiable = frozenset(spec.name for spec in inputs if spec.requires_grad)
        self._owed = frozenset(spec.name for spec in outputs if spec.requires_grad)

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
    ) -> dict[str, Tensor]:
        """Run microbatch `serial` and keep what its backward needs; return the values that cross the next cut.

        `inputs` become leaves of the stage's graph, so they are tensors that nobody else holds, and part of no graph.
        On the last stage return all values, for `loss`. With `split` its backward comes in two halves.

        Raises:
            ModelError: a value needs a gradient although it did not when shapes were inferred, or the other way round.
        """
        needing = {name: value.requires_grad_() for name, value in inputs.items() if name in self._differentiable}
        deferred: Deferred | None = [] if split else None
        values = self._run(modules, {**fields, **inputs}, key, deferred)
        saved = self._saved[serial] = _Saved(needing, deferred)
        if self.is_last:
            return values
        outputs = {name: values[name] for name in self.outputs}
        saved.roots = {name: _edge(value) for name, value in outputs.items() if value.requires_grad}
        if odd := sorted(saved.roots.keys() ^ self._owed):
            needs = "needs" if odd[0] in saved.roots else "needs no"
            raise ModelError(
                f"'{odd[0]}' {needs} gradient where the stage of blocks {self.start} to {self.stop - 1} ends, unlike "
                "when shapes were inferred on the meta device; blocks must not make that depend on data or device"
            )
        return {name: value.detach() for name, value in outputs.items()}

    def loss(
        self, serial: int, values: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        """Compute the parts of the microbatch's loss and make their sum the root of its backward."""
        parts = self.chain.loss(values, totals, num_samples)
        total = sum_parts(parts)
        if total.requires_grad:
            self._saved[serial].loss = _edge(total), torch.ones_like(total)
        return {name: part.detach() for name, part in parts.items()}

    def evaluate(
        self, modules: nn.ModuleList, inputs: Mapping[str, Tensor], fields: Mapping[str, Tensor], key: MicrobatchKey
    ) -> dict[str, Tensor]:
        """Run one microbatch forward only; nothing is kept."""
        with torch.no_grad():
            values = self._run(modules, {**fields, **inputs}, key)
        return values if self.is_last else {name: values[name] for name in self.outputs}

    def _run(
        self,
        modules: nn.ModuleList,
        values: dict[str, Tensor],
        key: MicrobatchKey,
        deferred: Deferred | None = None,
    ) -> dict[str, Tensor]:
        for index, module in zip(range(self.start, self.stop), modules, strict=True):
            call = partial(_seeded, key, index, module, deferred)
            if torch.is_grad_enabled() and self._recomputes(index, key.microbatch):
                call = partial(_checkpointed, module, call)
            values.update(call_block(self.chain.blocks[index], call, values))
        return values

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
            torch.autograd.backward(roots, seeds)
        if saved.deferred is not None:
            self._deferred[serial] = saved.deferred
        return {name: leaf.grad for name, leaf in saved.inputs.items() if leaf.grad is not None}

    def backward_weights(self, serial: int) -> None:
        """Run the half for weights of a backward that was split."""
        run_deferred(self._deferred.pop(serial))


def _edge(value: Tensor) -> GradientEdge:
    # The node of a view keeps the graph alive, whatever made the value, and costs less than `get_gradient_edge`.
    node = value.view_as(value).grad_fn
    assert node is not None
    return GradientEdge(node, 0)


def _seeded(key: MicrobatchKey, block: int, module: nn.Module, deferred: Deferred | None, *inputs: Tensor) -> Any:
    # Inside the call, so that a recomputed forward draws the same random numbers and is split in the same way.
    key.seed_block(block)
    if deferred is None:
        return module(*inputs)
    with DeferWeightGradients(deferred):
        return module(*inputs)


def _checkpointed(module: nn.Module, call: Callable[..., Any], *inputs: Tensor) -> Any:
    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _keeping_buffers(module)

    return checkpoint(call, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


@contextmanager
def _keeping_buffers(module: nn.Module) -> Iterator[None]:
    """Undo what a recomputed forward does to buffers: running statistics have seen the microbatch already."""
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
