"""All checks, those that tell most first."""

from __future__ import annotations

from gpu_check.check import Check

__all__ = ["CHECKS", "MACHINE"]

_NCCL = "NCCL needs CUDA devices"

MACHINE = Check(
    "environment", "torch, CUDA, driver, NCCL; each device computes", "gpu_check.machine:environment", 8, 0, limit=90
)
"""Runs first, as others need to know how many devices there are; it may have to read torch from a slow disk."""

CHECKS = (
    Check("train-1f1b", "demo's BERT, 2 ranks share a device: loss falls", "gpu_check.training:synchronous", 15),
    Check("verify-1f1b", "equals one process: dropout, clipping", "gpu_check.equality:synchronous", 20),
    Check("memory", "ledger against torch's allocator, 6 plans, 3 ranks", "gpu_check.measured:memory", 25),
    Check("verify-swap", "equals one process: activations to host memory", "gpu_check.equality:swapping", 20),
    Check("verify-recompute", "equals one process: recomputation", "gpu_check.equality:recomputing", 20),
    Check("train-pipedream", "asynchronous, 3 placements: loss falls", "gpu_check.training:asynchronous", 40),
    Check("verify-pipedream", "equals one process with the same delays", "gpu_check.equality:pipedream", 20),
    Check("verify-versions", "the same, weight versions to host memory", "gpu_check.equality:versions", 20),
    Check("killed", "a rank that is killed is told within seconds", "gpu_check.training:killed", 15),
    Check("nccl-train", "2 devices take NCCL by themselves", "gpu_check.training:nccl", 30, 2, _NCCL),
    Check("nccl-verify", "equals one process: 1f1b, pipedream", "gpu_check.equality:nccl", 40, 2, _NCCL),
    Check("nccl-zb-v", "equals one process: zb-v, interleaved", "gpu_check.equality:zero_bubble", 40, 2, _NCCL),
    Check("machines", "launch.machines with devices reversed", "gpu_check.equality:machines", 20, 2),
    Check("nccl-killed", "the other rank is inside NCCL", "gpu_check.training:killed_nccl", 15, 2, _NCCL),
    Check("swap", "pinned memory, side stream, hidden copies", "gpu_check.measured:swap", 15, alone=True),
    Check(
        "throughput", "against torch's Schedule1F1B, 2 ranks share a device", "gpu_check.measured:speed", 20,
        alone=True, judged=False,
    ),
    Check(
        "nccl-throughput", "against torch's Schedule1F1B, 2 devices", "gpu_check.measured:speed_nccl", 20, 2, _NCCL,
        alone=True, judged=False,
    ),
)  # fmt: skip
