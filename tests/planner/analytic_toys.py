"""A made-up device and model with round numbers."""

from __future__ import annotations

from typing import Any

from vpipe.planner.estimate.analytic import BlockWork, Machine, ModelWork, Operation, Precision
from vpipe.planner.estimate.devices import Device, LinkSpec

MIB = 1 << 20

# 1e9 operations and 1e6 bytes in a millisecond, of which half and all are reached; a kernel takes 10 us.
DEVICE = Device("toy", {"bf16": 1.0, "fp32": 0.1}, 16 * MIB, 1.0, "nvlink3", 1.0, {"bf16": 0.5, "fp32": 0.5}, 1.0, 10.0)
LINK = LinkSpec("wire", 100.0, 0.5)


def machine(**changes: Any) -> Machine:
    options: dict[str, Any] = {"device": DEVICE, "link": LINK, "precision": Precision()} | changes
    return Machine(**options)


def work(name: str = "block", **changes: Any) -> BlockWork:
    """Return a block whose forward takes 2 ms, each half of its backward as long."""
    options: dict[str, Any] = {
        "forward": (Operation("mm", 10**9, 1000),),
        "input_grad": (Operation("mm", 10**9, 1000),),
        "weight_grad": (Operation("mm", 10**9, 1000),),
        "num_parameters": 10_000,
        "activation_bytes": MIB,
        "input_bytes": MIB // 8,
        "output_bytes": MIB // 8,
        "input_grad_bytes": MIB // 2,
        "weight_grad_bytes": MIB // 2,
        "workspace_bytes": 0,
        "buffer_bytes": 0,
    } | changes
    return BlockWork(name, **options)


def model(num_blocks: int = 8, sizes: tuple[int, ...] = (1,), tokens: int = 128, **changes: Any) -> ModelWork:
    blocks = [work(f"block.{index}", **changes) for index in range(num_blocks - 1)]
    last = work(f"block.{num_blocks - 1}", **changes | {"output_bytes": 0})
    return ModelWork("toy", 10_000 * num_blocks, tokens, dict.fromkeys(sizes, (*blocks, last)), 2)
