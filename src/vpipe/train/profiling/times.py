"""How long a block takes: every action of the runtime timed several times over, warm-up left out.

In a run, by the time that a block's turn comes again, the blocks beside it have filled the processor's caches with
their own weights and activations. A block that is timed over and over would find its own there, and be up to a fifth
faster. So several copies of it are timed, one after another as in a stage: all forward, then all backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, quantiles

import torch

from vpipe.train.profiling.trial import BlockTrial

__all__ = ["BlockTimes", "Timings", "summarise_times", "take_rounds", "take_steps"]

MIN_ROUNDS, MAX_ROUNDS = 3, 15
_HICCUP = 3.0
"""What takes so many times the median is left out: something else ran."""

Timings = dict[str, list[float]]
"""Milliseconds of every repeat, by what was timed."""


@dataclass(frozen=True)
class BlockTimes:
    """Means in ms; `spread` is half the distance between the quartiles of forward and backward, per median."""

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


class _Copy:
    """One copy of the block; what is timed are its methods, by their names."""

    def __init__(self, trial: BlockTrial) -> None:
        trial.weights.start([0] * 3 * (MAX_ROUNDS + 1))
        self._trial = trial
        self._kept, self._again, self._empty = trial.stage(), trial.stage(recomputes=True), trial.stage(is_empty=True)

    def forward(self) -> None:
        self._trial.forward(self._kept.stage)

    def backward(self) -> None:
        self._trial.backward(self._kept)

    def split_forward(self) -> None:
        self._trial.forward(self._kept.stage, split=True)

    def input_grad(self) -> None:
        self._trial.backward(self._kept, split=True)

    def weight_grad(self) -> None:
        self._trial.backward_weights(self._kept)

    def light_forward(self) -> None:
        self._trial.forward(self._again.stage)

    def heavy_backward(self) -> None:
        self._trial.backward(self._again)

    def empty_forward(self) -> None:
        self._trial.forward(self._empty.stage)

    def empty_backward(self) -> None:
        self._empty.stage.backward(0, {})


_FORTH = ("forward", "split_forward", "light_forward", "empty_forward")
_BACK = (("backward",), ("input_grad", "weight_grad"), ("heavy_backward",), ("empty_backward",))
"""What follows each of these, in the other direction."""


def take_rounds(
    trials: Sequence[BlockTrial], device: torch.device, agree: Callable[[float], float], budget_ms: float
) -> Timings:
    """Time forwards and backwards of all kinds, in turn, for about `budget_ms`; `trials` are copies of one block.

    The first round is not counted. `agree` turns this rank's time of one round into that of the slowest rank, and lets
    all ranks begin together.
    """
    copies = [_Copy(trial) for trial in trials]
    warm = _Clock(device)
    _round(copies, warm)
    round_ms = agree(sum(sum(times) for times in warm.taken.values()))
    clock = _Clock(device)
    for _ in range(max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_ms / max(round_ms, 1e-3))))):
        _round(copies, clock)
    return clock.taken


def _round(copies: Sequence[_Copy], clock: _Clock) -> None:
    for forth, back in zip(_FORTH, _BACK, strict=True):
        for copy in copies:
            clock(forth, getattr(copy, forth))
        for name in back:
            for copy in reversed(copies):
                clock(name, getattr(copy, name))


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

    A stage takes the sum of its blocks' times, so means are what counts, and not medians: most repeats are a little
    faster than the mean. What a stage takes without any block is no block's. The halves of a split backward are scaled
    to the sum that an ordinary one takes.
    """
    pooled: Timings = {}
    for taken in timings:
        for name, times in taken.items():
            pooled.setdefault(name, []).extend(times)
    middle = {name: _mean(times) for name, times in pooled.items()}
    backward = max(0.0, middle["backward"] - middle["empty_backward"])
    halves = middle["input_grad"] + middle["weight_grad"]
    weight_grad = backward * middle["weight_grad"] / halves
    both = [forward + backward for forward, backward in zip(pooled["forward"], pooled["backward"], strict=True)]
    again = zip(pooled["light_forward"], pooled["heavy_backward"], strict=True)
    low, _, high = quantiles(both, n=4)
    return BlockTimes(
        forward_ms=max(0.0, middle["forward"] - middle["empty_forward"]),
        input_grad_ms=backward - weight_grad,
        weight_grad_ms=weight_grad,
        recompute_ms=max(0.0, _mean([light + heavy for light, heavy in again]) - _mean(both)),
        step_ms=middle["step"],
        spread=(high - low) / 2 / median(both),
    )


def _mean(times: Sequence[float]) -> float:
    """Return the mean without hiccups of the machine."""
    most = _HICCUP * median(times)
    return fmean(time for time in times if time <= most)
