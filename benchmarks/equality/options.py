"""What a row may have besides model, schedule and ranks: optimizers, what an update does, where activations go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["MEMORIES", "OPTIMIZERS", "UPDATES", "UpdateOption", "policies_of"]

Named = list[tuple[str, nn.Parameter]]
Made = Sequence[torch.optim.Optimizer]


def _sgd(named: Named) -> Made:
    return [torch.optim.SGD(named, lr=0.05)]


def _momentum(named: Named) -> Made:
    return [torch.optim.SGD(named, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)]


def _adam(named: Named) -> Made:
    return [torch.optim.Adam(named, lr=0.01)]


def _adamw(named: Named) -> Made:
    """Leave marked weights and vectors without decay."""
    free = [pair for pair in named if getattr(pair[1], "no_decay", False) or pair[1].dim() < 2]
    ids = {id(parameter) for _, parameter in free}
    groups = [
        {"params": [pair for pair in named if id(pair[1]) not in ids], "weight_decay": 0.1},
        {"params": free, "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW([group for group in groups if group["params"]], lr=0.01, amsgrad=True)]


def _groups(named: Named) -> Made:
    """Give vectors another rate."""
    groups: list[dict[str, Any]] = [
        {"params": [pair for pair in named if pair[1].dim() > 1]},
        {"params": [pair for pair in named if pair[1].dim() < 2], "lr": 0.006},
    ]
    return [torch.optim.RMSprop([group for group in groups if group["params"]], lr=0.002, momentum=0.5)]


def _several(named: Named) -> Made:
    """Share the weights out: matrices, vectors, and those that get gradients by rows."""
    by_rows = [pair for pair in named if getattr(pair[1], "by_rows", False)]
    others = [pair for pair in named if not getattr(pair[1], "by_rows", False)]
    matrices = [pair for pair in others if pair[1].dim() == 2 and not pair[1].is_complex()]
    rest = [pair for pair in others if pair[1].dim() != 2 or pair[1].is_complex()]
    made: list[torch.optim.Optimizer] = []
    if by_rows:
        made.append(torch.optim.SparseAdam(by_rows, lr=0.01))
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=0.02))
    if rest:
        made.append(torch.optim.NAdam(rest, lr=0.005))
    return made


OPTIMIZERS: dict[str, Callable[[Named], Made]] = {
    "sgd": _sgd,
    "momentum": _momentum,
    "adam": _adam,
    "adamw": _adamw,
    "groups": _groups,
    "several": _several,
}


def warmup(iterations: float) -> float:
    """Return a rate that rises and falls."""
    return 0.02 * min(1.0, (iterations + 0.5) / 2) / (1 + iterations / 4)


@dataclass(frozen=True)
class UpdateOption:
    """What an update does, and whether the second batch is NaN."""

    clip: float | None = None
    measures: bool = False
    schedules_rate: bool = False
    on_non_finite: str = "stop"
    has_nan: bool = False


UPDATES: dict[str, UpdateOption] = {
    "plain": UpdateOption(),
    "clip": UpdateOption(clip=0.1),
    "rate": UpdateOption(schedules_rate=True),
    "norm": UpdateOption(measures=True),
    "skip": UpdateOption(on_non_finite="skip", has_nan=True),
    "clip, rate": UpdateOption(clip=0.5, schedules_rate=True),
    "stop": UpdateOption(has_nan=True),
    "clip, skip": UpdateOption(clip=0.3, on_non_finite="skip", has_nan=True),
}

MEMORIES = (
    "keep", "recompute", "recompute some", "swap", "all three", "recompute but the last", "recompute ahead", "versions",
)  # fmt: skip


def policies_of(memory: str, num_blocks: int) -> list[str] | None:
    """Return what each block does with its activations."""
    pattern = {
        "recompute": ("recompute",),
        "recompute but the last": ("recompute",),
        "recompute ahead": ("recompute",),
        "recompute some": ("recompute", "keep"),
        "swap": ("swap",),
        "all three": ("recompute", "swap", "keep"),
        "versions": ("keep", "recompute"),
    }.get(memory)
    return None if pattern is None else [pattern[index % len(pattern)] for index in range(num_blocks)]
