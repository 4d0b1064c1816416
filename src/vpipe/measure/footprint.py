"""What a block holds in memory, as the runtime's ledger counts it: by storages, each once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile

from vpipe.measure.trial import BlockTrial
from vpipe.runtime.comm.message import MessageLayout
from vpipe.runtime.executor import HeldStage
from vpipe.runtime.memory.storages import num_bytes, place_of
from vpipe.runtime.memory.swap import SMALL_BYTES
from vpipe.runtime.stage.split import held_tensors

__all__ = ["Footprint", "measure_footprint"]


@dataclass(frozen=True)
class Footprint:
    """Bytes of one block for one microbatch, as `vpipe.planner.profile.profile.BlockProfile` defines them."""

    activation_bytes: int
    input_bytes: int
    output_bytes: int
    parameter_bytes: int
    input_grad_bytes: int
    weight_grad_bytes: int
    workspace_bytes: int
    first_workspace_bytes: int
    split_workspace_bytes: int
    step_workspace_bytes: int
    buffer_bytes: int
    small_bytes: int


def measure_footprint(trial: BlockTrial) -> Footprint:
    """Run the block forward and backward, whole and in halves, and count what is held."""
    parameters, buffers = list(trial.module.parameters()), list(trial.module.buffers())
    kept = trial.stage()
    held = _held_sizes(trial, kept)
    activation_bytes = sum(held)
    only_for_weights, weight_grad_bytes = _halves(trial, kept)
    workspace = _workspace(trial, kept)
    return Footprint(
        activation_bytes=activation_bytes,
        input_bytes=sum(_held_sizes(trial, trial.stage(recomputes=True))),
        output_bytes=MessageLayout(trial.index, trial.leaving, trial.device).num_bytes,
        parameter_bytes=num_bytes(parameter for parameter in parameters if parameter.requires_grad),
        input_grad_bytes=max(0, activation_bytes - only_for_weights),
        weight_grad_bytes=weight_grad_bytes,
        workspace_bytes=workspace.usually,
        first_workspace_bytes=workspace.first,
        split_workspace_bytes=workspace.split,
        step_workspace_bytes=_step_workspace(trial),
        buffer_bytes=num_bytes([*(parameter for parameter in parameters if not parameter.requires_grad), *buffers]),
        small_bytes=sum(size for size in held if size <= SMALL_BYTES),
    )


def _held_sizes(trial: BlockTrial, held: HeldStage) -> list[int]:
    """List what a forward leaves; outputs, and what only passes through, belong to the block that reads them."""
    written = trial.forward(held.stage, is_watched=True)
    sizes = held.stage.held(0)
    read = {place_of(trial.inputs[name]) for name in trial.read}
    others = {place_of(value) for value in (*trial.inputs.values(), *([] if trial.is_last else written.values()))}
    trial.backward(held)
    return [size for place, size in sizes.items() if place in read or place not in others]


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
    return num_bytes(only), num_bytes(waiting)


@dataclass(frozen=True)
class _Workspace:
    usually: int
    first: int
    split: int


def _workspace(trial: BlockTrial, held: HeldStage) -> _Workspace:
    """Return by how much a forward and a backward, at their peak, exceed what is held before and after.

    The first backward of an update makes gradients, which stay: what it takes is counted from its beginning alone.
    """
    meter = _Meter(trial.device)
    most: dict[bool, int] = {}
    for has_gradients in (False, True):
        _set_gradients(trial, there=has_gradients)
        forward = meter.excess(lambda: trial.forward(held.stage))
        backward = meter.excess if has_gradients else meter.peak
        most[has_gradients] = max(forward, backward(lambda: trial.backward(held)))
    # The allocator only tells of frees whose allocation was watched.
    forward = meter.excess(lambda: trial.forward(held.stage, split=True))
    halves = meter.excess(lambda: trial.backward(held, split=True))
    return _Workspace(most[True], most[False], max(forward, halves, meter.excess(lambda: trial.backward_weights(held))))


def _step_workspace(trial: BlockTrial) -> int:
    """Return by how much an update exceeds the weights, their gradients and the optimizer's state."""
    for _ in range(2):  # the first one makes the state
        _set_gradients(trial, there=True)
        trial.weights.start([])
        workspace = _Meter(trial.device).excess(trial.weights.step)
    return workspace


def _set_gradients(trial: BlockTrial, *, there: bool) -> None:
    for parameter in trial.weights.parameters:
        parameter.grad = torch.zeros_like(parameter) if there else None


class _Meter:
    """Watches what is allocated while something is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def peak(self, do: Callable[[], object]) -> int:
        """Return by how much the peak exceeds the beginning."""
        return self._watch(do)[0]

    def excess(self, do: Callable[[], object]) -> int:
        """Return by how much it exceeds both the beginning and the end."""
        peak, end = self._watch(do)
        return peak - max(0, end)

    def _watch(self, do: Callable[[], object]) -> tuple[int, int]:
        if self._device.type == "cuda":
            return self._on_gpu(do)
        with profile(profile_memory=True) as watched:
            result = do()
        del result  # what was computed is still there at the end
        assert watched.kineto_results is not None
        events = [event for event in watched.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        # torch's stubs leave the method out; what is freed counts as negative.
        running = [0, *accumulate(event.nbytes() for event in events)]
        return max(running), running[-1]

    def _on_gpu(self, do: Callable[[], object]) -> tuple[int, int]:
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        result = do()
        torch.cuda.synchronize(self._device)
        end = torch.cuda.memory_allocated(self._device)
        del result  # what was computed is still there at the end
        return torch.cuda.max_memory_allocated(self._device) - before, end - before
