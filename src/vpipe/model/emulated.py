"""Blocks that sleep instead of computing, so that the runtime can be measured with more ranks than there are cores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vpipe.errors import ModelError
from vpipe.model.chain import Block, Chain
from vpipe.model.loss import CallableLoss

__all__ = ["EmulatedBlock", "build_emulated_chain"]


class EmulatedBlock(nn.Module):
    """Scale the last dimension by one small parameter, taking `forward_ms` forward and `backward_ms` backward.

    Input and output have shape (..., width). On the meta device no time passes. `time.sleep` takes about 0.17 ms longer
    than asked for.
    """

    def __init__(self, forward_ms: float, backward_ms: float, width: int) -> None:
        super().__init__()
        if min(forward_ms, backward_ms) < 0 or width < 1:
            raise ModelError(
                "an emulated block needs times of at least 0 ms and a width of at least 1; "
                f"got forward_ms={forward_ms}, backward_ms={backward_ms}, width={width}"
            )
        self.forward_ms = forward_ms
        self.backward_ms = backward_ms
        self.scale = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start close to the identity, so that values keep their size through many blocks."""
        nn.init.normal_(self.scale, 1.0, 0.01)

    def forward(self, value: Tensor) -> Tensor:
        """Sleep for `forward_ms` and return the scaled `value`."""
        scaled = _SleepyScale.apply(value, self.scale, self.forward_ms, self.backward_ms)  # type: ignore[no-untyped-call]
        return cast(Tensor, scaled)

    def extra_repr(self) -> str:
        """Show the times."""
        return f"forward_ms={self.forward_ms}, backward_ms={self.backward_ms}, width={self.scale.numel()}"


def build_emulated_chain(
    num_blocks: int, forward_ms: float | Sequence[float], backward_ms: float | Sequence[float], width: int
) -> Chain:
    """Return a chain of emulated blocks with a mean squared error, over the fields `input` and `target` of `width`.

    Times are those of one microbatch on one block: one number for all blocks, or one for each.

    Raises:
        ModelError: a negative time, or another number of times than blocks.
    """
    forwards = _per_block("forward_ms", forward_ms, num_blocks)
    backwards = _per_block("backward_ms", backward_ms, num_blocks)
    blocks = []
    for index, (forward, backward) in enumerate(zip(forwards, backwards, strict=True)):
        build = partial(EmulatedBlock, forward, backward, width)
        blocks.append(Block(f"block.{index}", build, ("hidden" if index else "input",), ("hidden",)))
    return Chain(tuple(blocks), ("input", "target"), CallableLoss(nn.functional.mse_loss))


def _per_block(name: str, times: float | Sequence[float], num_blocks: int) -> list[float]:
    if not isinstance(times, Sequence):
        return [times] * num_blocks
    if len(times) != num_blocks:
        raise ModelError(
            f"{name} has {len(times)} times for {num_blocks} blocks; give one number, or one for each block"
        )
    return list(times)


class _SleepyScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor, forward_ms: float, backward_ms: float) -> Tensor:
        ctx.save_for_backward(value, scale)
        ctx.backward_ms = backward_ms
        _sleep(forward_ms, value)
        return value * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        value, scale = ctx.saved_tensors
        _sleep(ctx.backward_ms, gradient)
        to_value = gradient * scale if ctx.needs_input_grad[0] else None
        to_scale = (gradient * value).reshape(-1, scale.numel()).sum(0) if ctx.needs_input_grad[1] else None
        return to_value, to_scale, None, None


def _sleep(milliseconds: float, tensor: Tensor) -> None:
    if not tensor.is_meta and milliseconds > 0:
        time.sleep(milliseconds / 1000)
