"""What a block holds in memory: counted from what autograd saves, by storages, each once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile

from vpipe.model.chain import call_block
from vpipe.model.loss import sum_parts
from vpipe.runtime.split import Deferred, DeferWeightGradients
from vpipe.train.profiling.trial import BlockTrial

__all__ = ["Footprint", "measure_footprint"]


@dataclass(frozen=True)
class Footprint:
    """Bytes of one block for one microbatch, as `vpipe.plan.profile.BlockProfile` defines them."""

    activation_bytes: int
    input_bytes: int
    output_bytes: int
    parameter_bytes: int
    input_grad_bytes: int
    weight_grad_bytes: int
    workspace_bytes: int
    buffer_bytes: int


@dataclass
class _Storages:
    """Memory that tensors lie in: its size, and how often it was met."""

    sizes: dict[int, int] = field(default_factory=dict)
    counts: Counter[int] = field(default_factory=Counter)

    def add(self, tensors: Iterable[Tensor]) -> _Storages:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.counts[storage.data_ptr()] += 1
        return self

    def num_bytes(self, *, without: Iterable[int] = ()) -> int:
        left_out = set(without)
        return sum(size for place, size in self.sizes.items() if place not in left_out)


class _Run:
    """One forward of a block, and what its graph saved."""

    def __init__(self, trial: BlockTrial, deferred: Deferred | None) -> None:
        chain, block = trial.chain, trial.chain.blocks[trial.index]
        leaves = {spec.name: trial.inputs[spec.name].detach() for spec in trial.arriving}
        for spec in trial.arriving:
            leaves[spec.name].requires_grad_(spec.requires_grad)
        self.saved = _Storages()
        values = {**trial.fields, **leaves}
        with saved_tensors_hooks(self._pack, lambda kept: kept):
            if deferred is None:
                written = call_block(block, trial.module, values)
            else:
                with DeferWeightGradients(deferred):
                    written = call_block(block, trial.module, values)
            if trial.is_last:
                parts = chain.loss({**values, **written}, trial.sample.totals, trial.sample.num_samples)
                written = {"loss": sum_parts(parts)}
        self.outputs = {name: value for name, value in written.items() if value.requires_grad}
        # Weights and batch fields are counted elsewhere, and outputs with the block that reads them.
        others = [*trial.module.parameters(), *trial.module.buffers(), *trial.fields.values()]
        self.others = set(_Storages().add([*others, *written.values()]).sizes)
        self._trial = trial

    def _pack(self, tensor: Tensor) -> Tensor:
        self.saved.add([tensor])
        return tensor.detach()

    def backward(self) -> None:
        gradients = self._trial.gradients
        known = {name: value for name, value in self.outputs.items() if name in gradients or name == "loss"}
        if known:
            seeds = [gradients.get(name, torch.ones_like(value)) for name, value in known.items()]
            torch.autograd.backward(list(known.values()), seeds)


def measure_footprint(trial: BlockTrial) -> Footprint:
    """Run the block forward and backward, whole and in halves, and count what is held."""
    parameters, buffers = list(trial.module.parameters()), list(trial.module.buffers())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    inputs = _Storages().add(trial.inputs[name] for name in trial.read)
    run = _Run(trial, None)
    run.saved.sizes.update(inputs.sizes)
    activations = run.saved.num_bytes(without=run.others - inputs.sizes.keys())
    del run
    for_inputs, for_weights = _halves(trial, inputs)
    return Footprint(
        activation_bytes=activations,
        input_bytes=inputs.num_bytes(),
        output_bytes=sum(spec.num_bytes for spec in trial.leaving),
        parameter_bytes=_Storages().add(trained).num_bytes(),
        input_grad_bytes=min(for_inputs, activations),
        weight_grad_bytes=for_weights,
        workspace_bytes=_workspace(trial),
        buffer_bytes=_Storages().add([*frozen, *buffers]).num_bytes(),
    )


def _halves(trial: BlockTrial, inputs: _Storages) -> tuple[int, int]:
    """Return what the input half of a split backward reads, and what waits for the weight half after it."""
    deferred: Deferred = []
    run = _Run(trial, deferred)
    run.backward()
    waiting = [value for rest in deferred for value in vars(rest).values() if isinstance(value, Tensor)]
    weights = _Storages().add(trial.module.parameters()).sizes
    between = _Storages().add(waiting)
    # A storage that was saved as often as weight gradients wait for it, is read by nothing else.
    only_for_weights = {place for place, count in run.saved.counts.items() if count <= between.counts[place]}
    others = run.others - inputs.sizes.keys()
    return run.saved.num_bytes(without=others | only_for_weights), between.num_bytes(without=weights)


def _workspace(trial: BlockTrial) -> int:
    """Return by how much a forward and backward, at their peak, exceed what is held between them."""
    for parameter in trial.module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    device = next(iter((*trial.inputs.values(), *trial.fields.values()))).device
    if device.type == "cuda":
        return _cuda_workspace(trial, device)
    with profile(profile_memory=True) as forward:
        run = _Run(trial, None)
    with profile(profile_memory=True) as backward:
        run.backward()
    first, second = _allocations(forward), _allocations(backward)
    return max(0, max(accumulate(first), default=0) - sum(first), max(accumulate(second), default=0))


def _allocations(watched: profile) -> list[int]:
    """Return the bytes of every allocation in order; those that were freed are negative."""
    assert watched.kineto_results is not None
    events = [event for event in watched.kineto_results.events() if event.name() == "[memory]"]
    # torch's stubs leave the method out.
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # type: ignore[attr-defined]


def _cuda_workspace(trial: BlockTrial, device: torch.device) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    run = _Run(trial, None)
    held = torch.cuda.memory_allocated(device)
    run.backward()
    torch.cuda.synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - held)
