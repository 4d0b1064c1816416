"""Where the ranks of a run compute."""

from __future__ import annotations

import os

import torch

from vpipe.config import RunConfig

__all__ = ["device_of"]


def device_of(config: RunConfig) -> str:
    """Return this rank's device: as configured, else `cuda` where torch finds a GPU, else `cpu`.

    Where `launch.machines` lists GPUs it is the rank's own.
    """
    launch = config.launch
    kind = launch.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    rank = int(os.environ.get("RANK", "0"))
    if kind == "cuda" and rank < len(launch.machines):
        return f"cuda:{launch.machines[rank].partition(':')[2]}"
    return kind
