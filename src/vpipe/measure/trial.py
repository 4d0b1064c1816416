"""One block by itself, as a stage of its own: run as the runtime runs it, on data like the run's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vpipe.model.block import parts_of
from vpipe.model.chain import Chain, ValueSpec
from vpipe.runtime.executor import HeldStage
from vpipe.runtime.stage.key import MicrobatchKey
from vpipe.runtime.stage.stage import Stage
from vpipe.runtime.weights.stage_optimizer import OptimizerFactory
from vpipe.runtime.weights.weights import WeightVersions

__all__ = ["BlockTrial", "Sample", "make_trial"]


@dataclass(frozen=True)
class Sample:
    """One microbatch: its batch fields, and what its loss is normalised by."""

    fields: Mapping[str, Tensor]
    num_samples: int
    totals: Mapping[str, float]


@dataclass
class BlockTrial:
    """Block `index` with its weights, the values and gradients that arrive at it, and a microbatch of data."""

    chain: Chain
    index: int
    module: nn.Module
    weights: WeightVersions
    inputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    sample: Sample
    arriving: tuple[ValueSpec, ...]
    leaving: tuple[ValueSpec, ...]
    device: torch.device

    @property
    def is_last(self) -> bool:
        """Tell whether the loss follows the block."""
        return self.index == len(self.chain) - 1

    @property
    def read(self) -> tuple[str, ...]:
        """Name the values, and no fields of the batch, that the block reads, and the loss after the last one."""
        names = self.chain.blocks[self.index].inputs + (self.chain.loss.inputs if self.is_last else ())
        return tuple(dict.fromkeys(name for name in parts_of(self.arriving, names) if name in self.inputs))

    @property
    def fields(self) -> dict[str, Tensor]:
        """Return the batch fields that the block reads, and the loss after the last one."""
        return {name: self.sample.fields[name] for name in self.chain.fields_of(self.index, self.index + 1)}

    @property
    def optimizer_bytes(self) -> int:
        """Return the size of the optimizer's state, which is there after the first update."""
        optimizer = self.weights.optimizer
        kept = [] if optimizer is None else [item for state in optimizer.state.values() for item in state.values()]
        return sum(item.untyped_storage().nbytes() for item in kept if isinstance(item, Tensor))

    def stage(self, *, recomputes: bool = False, swaps: bool = False, is_empty: bool = False) -> HeldStage:
        """Return a stage of this one block, or of none: of what arrives at the block, handed on as it is."""
        stop = self.index if is_empty else self.index + 1
        swapping = (self.index,) if swaps else ()
        stage = Stage(self.chain, self.index, stop, lambda block, microbatch: recomputes, swapping)
        stage.expect(self.arriving, self.arriving if is_empty else self.leaving)
        return HeldStage(stage, self.weights)

    def forward(self, stage: Stage, *, split: bool = False, is_watched: bool = False) -> dict[str, Tensor]:
        """Run the block, and the loss after the last one, as the executor does; return what it writes."""
        key = MicrobatchKey(0, 0, 0)
        fresh = {name: value.detach() for name, value in self.inputs.items()}
        modules = self.weights.newest if stage.stop > stage.start else nn.ModuleList()
        values = stage.forward(0, modules, fresh, self.fields, key, split, is_watched)
        if stage.is_last:
            stage.loss(0, values, self.sample.totals, self.sample.num_samples)
        return values

    def backward(self, held: HeldStage, *, split: bool = False) -> None:
        """Run the backward of the latest forward, or its half for inputs, as the executor does."""
        self.weights.accumulate(0, lambda: held.stage.backward(0, self.gradients), is_last_use=not split)

    def backward_weights(self, held: HeldStage) -> None:
        """Run the half for weights."""
        self.weights.accumulate(0, lambda: held.stage.backward_weights(0))


def make_trial(
    chain: Chain,
    index: int,
    specs: Mapping[int, tuple[ValueSpec, ...]],
    values: Mapping[str, Tensor],
    sample: Sample,
    optimizer: OptimizerFactory,
    *,
    seed: int,
    device: torch.device,
) -> BlockTrial:
    """Give block `index` its memory. `specs[i]` is what crosses in front of block i, `values` are such values."""
    module = chain.materialise(index, seed, device)
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    leaving = specs.get(index + 1, ())
    gradients = {
        spec.name: torch.randn(spec.shape, dtype=spec.dtype, device=device) for spec in leaving if spec.requires_grad
    }
    return BlockTrial(
        chain,
        index,
        module,
        WeightVersions([module], names, optimizer),
        {spec.name: values[spec.name] for spec in specs[index]},
        gradients,
        sample,
        specs[index],
        leaving,
        device,
    )
