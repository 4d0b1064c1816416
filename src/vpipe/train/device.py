"""Where the ranks of a run compute."""

from __future__ import annotations

import torch

from vpipe.config import RunConfig

__all__ = ["device_of"]


def device_of(config: RunConfig) -> str:
    """Return the run's device: as configured, else `cuda` where torch finds a GPU, else `cpu`."""
    if config.launch.device != "auto":
        return config.launch.device
    return "cuda" if torch.cuda.is_available() else "cpu"
