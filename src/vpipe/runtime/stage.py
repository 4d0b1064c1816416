"""One stage: the forward and the backward of one microbatch through a range of blocks.

Weights are passed in, so the same stage serves every weight version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint

from vpipe.model.chain import Chain, call_block
from vpipe.model.loss import sum_parts
from vpipe.model.rng import derive_seed, seed_everything

__all__ = ["MicrobatchKey", "Stage"]


@dataclass(frozen=True)
class MicrobatchKey:
    """Where in the training a microbatch is: everything its random numbers depend on, besides the block."""

    seed: int
    iteration: int
    microbatch: int

    def seed_block(self, block: int) -> None:
        """Set the random state in which `block` runs for this microbatch."""
        seed_everything(derive_seed(self.seed, "dropout", self.iteration, self.microbatch, block))


def _seeded(key: MicrobatchKey, block: int, module: nn.Module, *inputs: Tensor) -> Any:
    key.seed_block(block)
    return module(*inputs)


@dataclass
class _Saved:
    """What a forward leaves for its backward: input leaves, and for each output where its graph begins."""

    inputs: dict[str, Tensor]
    roots: dict[str, GradientEdge] = field(default_factory=dict)


class Stage:
    """Blocks `start` to `stop - 1` of a chain.

    `recomputes(block, microbatch)` says which blocks keep no activations for a microbatch (by its index inside the batch).
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
        self.differentiable: frozenset[str] = frozenset()
        """The inputs that need a gradient, as shape inference found them."""
        self._recomputes = recomputes
        self._saved: dict[int, _Saved] = {}

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
    ) -> dict[str, Tensor]:
        """Run microbatch `serial` and keep what its backward needs; return the values that cross the next cut.

        On the last stage return all values, for `loss`.
        """
        leaves = {name: value.detach().requires_grad_(name in self.differentiable) for name, value in inputs.items()}
        values = self._run(modules, {**fields, **leaves}, key)
        saved = self._saved[serial] = _Saved({name: leaf for name, leaf in leaves.items() if leaf.requires_grad})
        if self.is_last:
            return values
        outputs = {name: values[name] for name in self.outputs}
        saved.roots = {name: get_gradient_edge(value) for name, value in outputs.items() if value.requires_grad}
        return {name: value.detach() for name, value in outputs.items()}

    def loss(
        self, serial: int, values: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        """Compute the parts of the microbatch's loss and make their sum the root of its backward."""
        parts = self.chain.loss(values, totals, num_samples)
        total = sum_parts(parts)
        if total.requires_grad:
            self._saved[serial].roots = {"loss": get_gradient_edge(total)}
            self._saved[serial].inputs["loss"] = torch.ones_like(total)
        return {name: part.detach() for name, part in parts.items()}

    def evaluate(
        self, modules: nn.ModuleList, inputs: Mapping[str, Tensor], fields: Mapping[str, Tensor], key: MicrobatchKey
    ) -> dict[str, Tensor]:
        """Run one microbatch forward only; nothing is kept."""
        with torch.no_grad():
            values = self._run(modules, {**fields, **inputs}, key)
        return values if self.is_last else {name: values[name] for name in self.outputs}

    def _run(self, modules: nn.ModuleList, values: dict[str, Tensor], key: MicrobatchKey) -> dict[str, Tensor]:
        for index, module in zip(range(self.start, self.stop), modules, strict=True):
            # Seeding inside the call makes a recomputed forward draw the same random numbers.
            call: Callable[..., Any] = partial(_seeded, key, index, module)
            if torch.is_grad_enabled() and self._recomputes(index, key.microbatch):
                call = partial(checkpoint, call, use_reentrant=False, preserve_rng_state=False)
            values.update(call_block(self.chain.blocks[index], call, values))
        return values

    def backward(self, serial: int, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the backward of microbatch `serial`; return the gradients of the stage's inputs.

        `gradients` are those of the stage's outputs; the last stage needs none.
        """
        saved = self._saved.pop(serial)
        if self.is_last and saved.roots:
            gradients = {"loss": saved.inputs.pop("loss")}
        names = [name for name in saved.roots if name in gradients]
        if names:
            torch.autograd.backward([saved.roots[name] for name in names], [gradients[name] for name in names])
        # An input that nothing depended on still owes its sender a gradient.
        return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in saved.inputs.items()}
