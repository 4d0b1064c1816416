"""Emulated devices whose backward can be split: they sleep for F, for I and for W, and a slow network between them.

A split backward notes its half for weights where VPipe notes that of linear layers: it runs when the schedule says so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from vpipe.runtime.stage.split import Deferred, DeferWeightGradients


@dataclass(frozen=True)
class StageTimes:
    """What one microbatch takes on one stage, in ms."""

    forward_ms: float
    input_grad_ms: float
    weight_grad_ms: float


class _Device(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: nn.Parameter, times: StageTimes, deferred: Deferred | None) -> Tensor:
        time.sleep(times.forward_ms / 1e3)
        ctx.save_for_backward(hidden, weight)
        ctx.weight, ctx.times, ctx.deferred = weight, times, deferred
        return hidden * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight = ctx.saved_tensors
        whole = ctx.times.input_grad_ms + (0.0 if ctx.deferred is not None else ctx.times.weight_grad_ms)
        time.sleep(whole / 1e3)
        to_hidden = grads[0] * weight if ctx.needs_input_grad[0] else None

        def weight_grad() -> Tensor:
            product: Tensor = grads[0] * hidden
            return product.sum().reshape(1)

        if ctx.deferred is None:
            return to_hidden, weight_grad(), None, None
        parameter, times = ctx.weight, ctx.times

        def later() -> None:
            time.sleep(times.weight_grad_ms / 1e3)
            gradient = weight_grad()
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

        ctx.deferred.append(later)
        return to_hidden, None, None, None


class EmulatedDevice(nn.Module):
    """One stage: sleeps, and multiplies by one weight so that there is something to learn."""

    def __init__(self, times: StageTimes) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.times = times

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `hidden` times the weight, after the forward's time."""
        result: Tensor = _Device.apply(hidden, self.weight, self.times, self.find_deferred())  # type: ignore[no-untyped-call]
        return result

    def find_deferred(self) -> Deferred | None:
        """Return where the backward notes its half for weights; None for a full backward."""
        stack = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
        modes = [mode for mode in stack if isinstance(mode, DeferWeightGradients)]
        return modes[-1].deferred if modes else None


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return a loss that costs next to nothing; `target` is not looked at."""
    return output.mean()
