"""How long a block takes: every action of the runtime timed several times over, warm-up left out.

In a run, by the time that a block's turn comes again, the blocks beside it have filled the processor's caches with
their own weights and activations. A block that is timed over and over would find its own there, and be up to a fifth
faster. So before each action on a CPU as many bytes are touched, and then what has just arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from torch import Tensor

from vpipe.runtime.executor import HeldStage
from vpipe.train.profiling.trial import BlockTrial

__all__ = ["BlockTimes", "Timings", "summarise_times", "take_rounds", "take_steps"]

MIN_ROUNDS, MAX_ROUNDS = 3, 15
_MOST_TOUCHED_BYTES = 16 << 20
"""More than the caches and the page table entries that a core has for itself; what cores share is not emptied."""

Timings = dict[str, list[float]]
"""Milliseconds of every repeat, by what was timed."""


@dataclass(frozen=True)
class BlockTimes:
    """Medians in ms; `spread` is half the distance between the quartiles of forward and backward, per median."""

    forward_ms: float
    input_grad_ms: float
    weight_grad_ms: float
    recompute_ms: float
    step_ms: float
    spread: float


@dataclass
class _Clock:
    """Times calls; on a GPU until the work is done, as the executor does."""

    device: torch.device
    others: Tensor | None = None
    """What is touched before a call, in place of what other blocks would have touched."""
    taken: Timings = field(default_factory=dict)

    def __call__(self, name: str, call: Callable[[], object], arriving: Iterable[Tensor] = ()) -> None:
        if self.others is not None:
            self.others.add_(1)
            for value in arriving:
                value.sum()
        start = time.perf_counter_ns()
        call()
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.taken.setdefault(name, []).append((time.perf_counter_ns() - start) / 1e6)


def take_rounds(
    trial: BlockTrial,
    device: torch.device,
    agree: Callable[[float], float],
    budget_ms: float,
    others_bytes: int = 0,
) -> Timings:
    """Time forwards and backwards of all kinds, in turn, for about `budget_ms`.

    The first round is not counted. `agree` turns this rank's time of one round into that of the slowest rank, and lets
    all ranks begin together. `others_bytes` is what a rank's other blocks touch between two actions of this one.
    """
    stages = trial.stage(), trial.stage(recomputes=True), trial.stage(is_empty=True)
    trial.weights.start([0] * 3 * (MAX_ROUNDS + 1))
    others = None if device.type == "cuda" else torch.zeros(min(_MOST_TOUCHED_BYTES, others_bytes), dtype=torch.uint8)
    warm = _Clock(device, others)
    _round(trial, *stages, warm)
    round_ms = agree(sum(sum(times) for times in warm.taken.values()))
    clock = _Clock(device, others)
    for _ in range(max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_ms / max(round_ms, 1e-3))))):
        _round(trial, *stages, clock)
    return clock.taken


def _round(trial: BlockTrial, kept: HeldStage, again: HeldStage, empty: HeldStage, clock: _Clock) -> None:
    inputs, gradients = trial.inputs.values(), trial.gradients.values()
    clock("forward", lambda: trial.forward(kept.stage), inputs)
    clock("backward", lambda: trial.backward(kept), gradients)
    clock("split_forward", lambda: trial.forward(kept.stage, split=True), inputs)
    clock("input_grad", lambda: trial.backward(kept, split=True), gradients)
    clock("weight_grad", lambda: trial.backward_weights(kept))
    clock("light_forward", lambda: trial.forward(again.stage), inputs)
    clock("heavy_backward", lambda: trial.backward(again), gradients)
    clock("empty_forward", lambda: trial.forward(empty.stage), inputs)
    clock("empty_backward", lambda: empty.stage.backward(0, {}), gradients)


def take_steps(trial: BlockTrial, device: torch.device, num_steps: int = 3) -> Timings:
    """Time updates, the first of which allocates the optimizer's state and is not counted."""
    clock = _Clock(device)
    for _ in range(num_steps + 1):
        for parameter in trial.weights.parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        trial.weights.start([])
        clock("step", trial.weights.step)
    return {"step": clock.taken["step"][1:]}


def summarise_times(timings: Iterable[Mapping[str, list[float]]]) -> BlockTimes:
    """Put the repeats of all ranks together.

    What a stage takes without any block is no block's. The halves of a split backward are scaled to the sum that an
    ordinary one takes.
    """
    pooled: Timings = {}
    for taken in timings:
        for name, times in taken.items():
            pooled.setdefault(name, []).extend(times)
    middle = {name: median(times) for name, times in pooled.items()}
    backward = max(0.0, middle["backward"] - middle["empty_backward"])
    halves = middle["input_grad"] + middle["weight_grad"]
    weight_grad = backward * middle["weight_grad"] / halves
    both = [forward + backward for forward, backward in zip(pooled["forward"], pooled["backward"], strict=True)]
    recomputing = zip(both, pooled["light_forward"], pooled["heavy_backward"], strict=True)
    low, _, high = quantiles(both, n=4)
    return BlockTimes(
        forward_ms=max(0.0, middle["forward"] - middle["empty_forward"]),
        input_grad_ms=backward - weight_grad,
        weight_grad_ms=weight_grad,
        recompute_ms=max(0.0, median(light + heavy - kept for kept, light, heavy in recomputing)),
        step_ms=middle["step"],
        spread=(high - low) / 2 / median(both),
    )
