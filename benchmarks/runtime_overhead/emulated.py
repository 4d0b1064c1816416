"""An emulated device: a block that sleeps for the rest of its forward and its backward time instead of computing.

Sleeping ranks do not contend for cores, so bubbles, latency and overlap of many ranks are real on a small machine.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from typing import Any

import torch
from torch import Tensor, nn

BOUNDARY_FLOATS = 16 * 1024  # 64 KB in fp32
NUM_RANKS = 4


_PR_SET_TIMERSLACK = 29
ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1)  # Linux lets a sleep last 50 us longer than asked, unless told not to


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, forward_ms: float, backward_ms: float) -> Tensor:
        start = time.perf_counter()
        ctx.save_for_backward(hidden, weight)
        ctx.backward_ms = backward_ms
        result = hidden * weight
        _sleep_until(start + forward_ms / 1e3)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        start = time.perf_counter()
        hidden, weight = ctx.saved_tensors
        grad_hidden = grads[0] * weight if ctx.needs_input_grad[0] else None
        grad_weight = (grads[0] * hidden).sum().reshape(1)
        _sleep_until(start + ctx.backward_ms / 1e3)
        return grad_hidden, grad_weight, None, None


def _sleep_until(end: float) -> None:
    time.sleep(max(0.0, end - time.perf_counter()))


class EmulatedBlock(nn.Module):
    """Take `forward_ms` forward and `backward_ms` backward, nearly all of it asleep; one weight, to have a gradient."""

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
