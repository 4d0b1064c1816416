"""Where the ranks of a run compute, and how they come together."""

from __future__ import annotations

import os

import torch

from vpipe.config import RunConfig
from vpipe.runtime.comm.world import World

__all__ = ["compute_reproducibly", "device_of", "join_world"]


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


def join_world(config: RunConfig) -> World:
    """Join the ranks of the run, as its configuration says.

    Raises:
        ConfigError, LaunchError, PeerLostError: as `World.join`.
    """
    launch = config.launch
    return World.join(
        device=device_of(config),
        timeout_seconds=launch.timeout_seconds,
        shared_memory=launch.shared_memory,
        backend=launch.distributed_backend,
    )


def compute_reproducibly(device: torch.device) -> None:
    """Let a GPU give the same bits every time, as far as torch can; a CPU does anyway.

    Where an operation has no deterministic kernel, torch warns. Its fused attention would do no more than that, so
    attention is computed in steps.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
