"""What all ranks measured, brought together."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist

from vpipe.runtime.comm.world import World

__all__ = ["gather", "slowest"]

T = TypeVar("T")


def gather(mine: T, world: World) -> list[T]:
    """Return every rank's value, by rank; collective."""
    return world.gather(mine, "the measurements of all ranks")


def slowest(milliseconds: float, world: World) -> float:
    """Return the largest of all ranks' times; collective, so that all ranks go on together."""
    time = torch.tensor(milliseconds, dtype=torch.float64)
    if world.peers is not None:
        with world.activity.meeting("all ranks to measure the same block", world.peers):
            dist.all_reduce(time, dist.ReduceOp.MAX, group=world.peers)
    return float(time)
