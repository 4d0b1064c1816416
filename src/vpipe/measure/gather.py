"""What all ranks measured, brought together."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

from vpipe.runtime.comm.process_group import ProcessGroup
from vpipe.runtime.comm.wait import telling_losses

__all__ = ["gather", "slowest"]

T = TypeVar("T")


def gather(mine: T, group: ProcessGroup) -> list[T]:
    """Return every rank's value, by rank; collective."""
    everyone: list[T] = [mine] * group.num_ranks
    with telling_losses("the measurements of all ranks"):
        dist.all_gather_object(everyone, mine, group=group.control)
    return everyone


def slowest(milliseconds: float, group: ProcessGroup) -> float:
    """Return the largest of all ranks' times; collective, so that all ranks go on together."""
    time = torch.tensor(milliseconds, dtype=torch.float64)
    with telling_losses("all ranks to measure the same block"):
        dist.all_reduce(time, dist.ReduceOp.MAX, group=group.control)
    return float(time)
