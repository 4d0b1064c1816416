"""How long a block takes: every action of the runtime timed several times over, warm-up left out.

In a run, by the time that a block's turn comes again, the blocks beside it have filled the processor's caches with
their own weights and activations. A block that is timed over and over would find its own there, and be up to a fifth
faster. So several copies of it are timed, one after another as in a stage: all forward, then all backward.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean, median, quantiles

import torch

from vpipe.measure.copies import Copier
from vpipe.measure.trial import BlockTrial

__all__ = [
    "BlockTimes",
    "Timings",
    "copying_share",
    "summarise_times",
    "take_beside",
    "take_rounds",
    "take_steps",
]

MIN_ROUNDS, MAX_ROUNDS = 3, 15
_USES_PER_ROUND = 4
"""Backwards of each copy in a round, but for the empty one."""
_COPYING_SHARE = 0.3
"""Of the time of a computation, for how long the host link is kept busy beside it: it shall be done before."""
_LEAST_BESIDE_MS = 20.0
"""How long at least a computation takes beside which something is copied."""
_MOST_ROWS = 100
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
    swap_ms: float
    step_ms: float
    version_ms: float
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
        self._trial = trial
        self.will_run(_USES_PER_ROUND * (MAX_ROUNDS + 1))
        self._kept, self._again, self._empty = trial.stage(), trial.stage(recomputes=True), trial.stage(is_empty=True)
        self._moved = trial.stage(swaps=True)

    def will_run(self, num_backwards: int) -> None:
        """Say how many backwards follow."""
        self._trial.weights.start([0] * num_backwards)

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

    def noting_forward(self) -> None:
        self._trial.forward(self._moved.stage)
        self._moved.stage.pack_up(0)

    def finding_backward(self) -> None:
        self._moved.stage.parcels(0)
        self._trial.backward(self._moved)

    def empty_forward(self) -> None:
        self._trial.forward(self._empty.stage)

    def empty_backward(self) -> None:
        self._empty.stage.backward(0, {})


_FORTH = ("forward", "split_forward", "light_forward", "noting_forward", "empty_forward")
_BACK = (
    ("backward",), ("input_grad", "weight_grad"), ("heavy_backward",), ("finding_backward",), ("empty_backward",)
)  # fmt: skip
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


def take_beside(
    trials: Sequence[BlockTrial],
    device: torch.device,
    agree: Callable[[float], float],
    copier: Copier,
    budget_ms: float,
) -> Timings:
    """Time forwards and backwards `alone` and, in turn, `beside` copies to host memory, for about `budget_ms`.

    `copied` is how long these copies take by themselves. `agree` as in `take_rounds`.
    """
    copies, clock, warm = [_Copy(trial) for trial in trials], _Clock(device), _Clock(device)
    warm("row", partial(_rows, copies, 1))
    row_ms = max(agree(warm.taken["row"][0]), 1e-3)
    num_rows = min(_MOST_ROWS, math.ceil(_LEAST_BESIDE_MS / row_ms))
    num_rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_ms / (2 * num_rows * row_ms))))
    for copy in copies:
        copy.will_run(2 * num_rows * num_rounds)
    copied = []
    for _ in range(num_rounds):
        agree(0.0)
        clock("alone", partial(_rows, copies, num_rows))
        agree(0.0)
        copied.append(copier.begin(_COPYING_SHARE * num_rows * row_ms))
        clock("beside", partial(_rows, copies, num_rows))
        copier.finish()
    return {**clock.taken, "copied": copied}


def _rows(copies: Sequence[_Copy], num_rows: int) -> None:
    for _ in range(num_rows):
        for copy in copies:
            copy.forward()
        for copy in reversed(copies):
            copy.backward()


def copying_share(timings: Iterable[Mapping[str, list[float]]]) -> tuple[float, float]:
    """Return what computations of one kind of block lost beside copies, and how long these copies take; all ranks'."""
    taken = [each for each in timings if "copied" in each]
    if not taken:
        return 0.0, 0.0
    alone, beside, copied = ([time for each in taken for time in each[name]] for name in ("alone", "beside", "copied"))
    return _mean(beside) - _mean(alone), fmean(copied)


def take_steps(trial: BlockTrial, device: torch.device, num_steps: int = 3) -> Timings:
    """Time updates that nobody needs the older weights after, and such that somebody does.

    The first of each allocates the optimizer's state, or another set of weights, and is not counted.
    """
    clock = _Clock(device)
    for name, uses in (("step", []), ("keeping_step", [0])):
        for _ in range(num_steps + 1):
            for parameter in trial.weights.parameters:
                parameter.grad = torch.full_like(parameter, 1e-3)
            trial.weights.start(uses)
            clock(name, trial.weights.step)
    return {name: times[1:] for name, times in clock.taken.items()}


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
    moved = zip(pooled["noting_forward"], pooled["finding_backward"], strict=True)
    low, _, high = quantiles(both, n=4)
    return BlockTimes(
        forward_ms=max(0.0, middle["forward"] - middle["empty_forward"]),
        input_grad_ms=backward - weight_grad,
        weight_grad_ms=weight_grad,
        recompute_ms=max(0.0, _mean([light + heavy for light, heavy in again]) - _mean(both)),
        swap_ms=max(0.0, _mean([noting + finding for noting, finding in moved]) - _mean(both)),
        step_ms=middle["step"],
        version_ms=max(0.0, middle["keeping_step"] - middle["step"]),
        spread=(high - low) / 2 / median(both),
    )


def _mean(times: Sequence[float]) -> float:
    """Return the mean without hiccups of the machine."""
    most = _HICCUP * median(times)
    return fmean(time for time in times if time <= most)
