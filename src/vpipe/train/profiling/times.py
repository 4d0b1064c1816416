"""How long a block takes: every action of the runtime timed several times over, warm-up left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch

from vpipe.runtime.executor import HeldStage
from vpipe.train.profiling.trial import BlockTrial

__all__ = ["BlockTimes", "Timings", "summarise_times", "take_rounds", "take_steps"]

MIN_ROUNDS, MAX_ROUNDS = 3, 15

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
    taken: Timings = field(default_factory=dict)

    def __call__(self, name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter_ns()
        call()
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.taken.setdefault(name, []).append((time.perf_counter_ns() - start) / 1e6)


def take_rounds(trial: BlockTrial, device: torch.device, agree: Callable[[float], float], budget_ms: float) -> Timings:
    """Time forwards and backwards of all kinds, in turn, for about `budget_ms`.

    The first rounds are not counted. `agree` turns this rank's time of one round into that of the slowest rank.
    """
    kept, again = trial.stage(), trial.stage(recomputes=True)
    trial.weights.start([0] * 3 * (MAX_ROUNDS + 2))
    _round(trial, kept, again, _Clock(device))  # allocates
    warm = _Clock(device)
    _round(trial, kept, again, warm)
    round_ms = agree(sum(sum(times) for times in warm.taken.values()))
    clock = _Clock(device)
    for _ in range(max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_ms / max(round_ms, 1e-3))))):
        _round(trial, kept, again, clock)
    return clock.taken


def _round(trial: BlockTrial, kept: HeldStage, again: HeldStage, clock: _Clock) -> None:
    def backward(held: HeldStage, *, split: bool) -> None:
        held.weights.accumulate(0, lambda: held.stage.backward(0, trial.gradients), is_last_use=not split)

    clock("forward", lambda: trial.forward(kept.stage, split=False))
    clock("backward", lambda: backward(kept, split=False))
    clock("split_forward", lambda: trial.forward(kept.stage, split=True))
    clock("input_grad", lambda: backward(kept, split=True))
    clock("weight_grad", lambda: kept.weights.accumulate(0, lambda: kept.stage.backward_weights(0)))
    clock("light_forward", lambda: trial.forward(again.stage, split=False))
    clock("heavy_backward", lambda: backward(again, split=False))


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

    The halves of a split backward are scaled to the sum that an ordinary one takes.
    """
    pooled: Timings = {}
    for taken in timings:
        for name, times in taken.items():
            pooled.setdefault(name, []).extend(times)
    middle = {name: median(times) for name, times in pooled.items()}
    backward, halves = middle["backward"], middle["input_grad"] + middle["weight_grad"]
    weight_grad = backward * middle["weight_grad"] / halves if halves else 0.0
    both = [first + second for first, second in zip(pooled["forward"], pooled["backward"], strict=True)]
    low, _, high = quantiles(both, n=4)
    return BlockTimes(
        middle["forward"],
        backward - weight_grad,
        weight_grad,
        max(0.0, middle["light_forward"] + middle["heavy_backward"] - middle["forward"] - backward),
        middle["step"],
        (high - low) / 2 / max(median(both), 1e-9),
    )
