"""What a block holds in memory, as the runtime's ledger counts it: by storages, each once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile

from vpipe.runtime.activations import place_of
from vpipe.runtime.executor import HeldStage
from vpipe.runtime.split import held_tensors
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


def measure_footprint(trial: BlockTrial) -> Footprint:
    """Run the block forward and backward, whole and in halves, and count what is held."""
    parameters, buffers = list(trial.module.parameters()), list(trial.module.buffers())
    kept = trial.stage()
    activation_bytes = _held_bytes(trial, kept)
    only_for_weights, weight_grad_bytes = _halves(trial, kept)
    return Footprint(
        activation_bytes=activation_bytes,
        input_bytes=_held_bytes(trial, trial.stage(recomputes=True)),
        output_bytes=sum(spec.num_bytes for spec in trial.leaving),
        parameter_bytes=_num_bytes(parameter for parameter in parameters if parameter.requires_grad),
        input_grad_bytes=max(0, activation_bytes - only_for_weights),
        weight_grad_bytes=weight_grad_bytes,
        workspace_bytes=_workspace(trial, kept),
        buffer_bytes=_num_bytes([*(parameter for parameter in parameters if not parameter.requires_grad), *buffers]),
    )


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({place_of(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _held_bytes(trial: BlockTrial, held: HeldStage) -> int:
    """Count what a forward leaves; outputs, and what only passes through, belong to the block that reads them."""
    written = trial.forward(held.stage, is_watched=True)
    sizes = held.stage.held(0)
    read = {place_of(trial.inputs[name]) for name in trial.read}
    others = {place_of(value) for value in (*trial.inputs.values(), *([] if trial.is_last else written.values()))}
    trial.backward(held)
    return sum(size for place, size in sizes.items() if place in read or place not in others)


def _halves(trial: BlockTrial, held: HeldStage) -> tuple[int, int]:
    """Return the activations that only weight gradients need, and what waits for these after the input half."""
    saved: list[Tensor] = []  # keeps what was saved from being freed, so that places stay what they are

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.detach())
        return saved[-1]

    with saved_tensors_hooks(pack, lambda kept: kept):
        trial.forward(held.stage, split=True)
    trial.backward(held, split=True)
    waiting = list(held_tensors(held.stage.deferred(0)))
    uses, waits = (Counter(map(place_of, tensors)) for tensors in (saved, waiting))
    # What was saved as often as weight gradients wait for it, is read by nothing else.
    only = [tensor for tensor in waiting if 0 < uses[place_of(tensor)] <= waits[place_of(tensor)]]
    trial.backward_weights(held)
    return _num_bytes(only), _num_bytes(waiting)


def _workspace(trial: BlockTrial, held: HeldStage) -> int:
    """Return by how much a forward and a backward, at their peak, exceed what is held before and after."""
    if trial.device.type == "cuda":
        return _cuda_workspace(trial, held)
    # Gradients are there by now, as they are for most of a run's backwards.
    with profile(profile_memory=True) as forward:
        trial.forward(held.stage)
    with profile(profile_memory=True) as backward:
        trial.backward(held)
    return max(_excess(forward), _excess(backward))


def _excess(watched: profile) -> int:
    assert watched.kineto_results is not None
    events = [event for event in watched.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    # torch's stubs leave the method out; what is freed counts as negative.
    running = [0, *accumulate(event.nbytes() for event in events)]  # type: ignore[attr-defined]
    peak, left = max(running), running[-1]
    return int(peak - max(0, left))


def _cuda_workspace(trial: BlockTrial, held: HeldStage) -> int:
    trial.forward(held.stage)
    before = torch.cuda.memory_allocated(trial.device)
    torch.cuda.reset_peak_memory_stats(trial.device)
    trial.backward(held)
    torch.cuda.synchronize(trial.device)
    return max(0, torch.cuda.max_memory_allocated(trial.device) - before)
