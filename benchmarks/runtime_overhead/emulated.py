"""An emulated device: a block that sleeps for its forward and its backward time instead of computing.

Sleeping ranks do not contend for cores, so bubbles, latency and overlap of many ranks are real on a small machine.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

BOUNDARY_FLOATS = 16 * 1024  # 64 KB in fp32
NUM_RANKS = 4


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, forward_ms: float, backward_ms: float) -> Tensor:
        time.sleep(forward_ms / 1e3)
        ctx.save_for_backward(hidden, weight)
        ctx.backward_ms = backward_ms
        return hidden * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        time.sleep(ctx.backward_ms / 1e3)
        hidden, weight = ctx.saved_tensors
        grad_hidden = grads[0] * weight if ctx.needs_input_grad[0] else None
        return grad_hidden, (grads[0] * hidden).sum().reshape(1), None, None


class EmulatedBlock(nn.Module):
    """Sleep `forward_ms` in the forward and `backward_ms` in the backward; one weight, so that there is a gradient."""

    def __init__(self, forward_ms: float, backward_ms: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.forward_ms = forward_ms
        self.backward_ms = backward_ms

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `hidden` times the weight, after `forward_ms`."""
        result: Tensor = _Sleep.apply(hidden, self.weight, self.forward_ms, self.backward_ms)  # type: ignore[no-untyped-call]
        return result


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return a loss that costs next to nothing; `target` is not looked at."""
    return output.mean()


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return the command line that all contestants of this benchmark share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--forward-ms", type=float, default=10.0)
    parser.add_argument("--backward-ms", type=float, default=20.0)
    parser.add_argument("--num-microbatches", type=int, default=8)
    parser.add_argument("--num-batches", type=int, default=10, help="measured batches")
    parser.add_argument("--num-warmup-batches", type=int, default=3)
    return parser
