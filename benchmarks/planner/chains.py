"""Chains of blocks that sleep, with the proportions of real models: what a run's `model.entry` and `data.entry` name.

**Times.** A transformer layer of BERT base takes 3 ms forward and 6 ms backward, a third of it attention and two thirds
feed-forward, as their matrices have parameters. Other matrices take as much per parameter; a lookup takes next to
nothing. Blocks that are no matrices (convolutions over the signal, attention over a whole document) are given a time.

**Parameters.** A share of the real blocks', a thousandth if nothing else is said: proportions are real, and an update
costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vpipe.model.chain import Block, Chain
from vpipe.model.loss import CallableLoss

__all__ = ["CHAINS", "SLOWDOWN", "SLOW_RANK", "WIDTH", "Spec", "chain", "data"]

WIDTH = 16 * 1024
"""Numbers that cross a cut for each sample: 64 KiB."""
SLOW_RANK, SLOWDOWN = 2, 2.0
MS_PER_MILLION = 3 / 7.08


@dataclass(frozen=True)
class Spec:
    """One block: what it sleeps forward on a device of speed 1 (backward: twice that), and its real parameters."""

    name: str
    forward_ms: float
    millions: float


def _matrices(name: str, millions: float) -> Spec:
    return Spec(name, round(millions * MS_PER_MILLION, 2), millions)


def _layer(index: int, wider: int = 1) -> list[Spec]:
    """Return BERT base's layer: attention, and a feed-forward that may be `wider`."""
    return [_matrices(f"layer.{index}.attention", 2.36), _matrices(f"layer.{index}.feed_forward", 4.72 * wider)]


def _layers(count: int) -> list[Spec]:
    return [spec for index in range(count) for spec in _layer(index)]


def _giant(index: int) -> list[Spec]:
    """Return a layer whose attention goes over the whole document: as many parameters, eight times the time."""
    attention, feed_forward = _layer(index)
    return [Spec(f"layer.{index}.document_attention", 8 * attention.forward_ms, attention.millions), feed_forward]


CHAINS: dict[str, tuple[Spec, ...]] = {
    # BERT base: a lookup in 30,522 words, and at the end a matrix of as many, with the transform before it.
    "heavy head": (Spec("embedding", 0.2, 23.8), *_layers(12), _matrices("head", 24.0)),
    # A speech model such as wav2vec 2.0: convolutions over the raw signal, few parameters, a third of the layers' time.
    "heavy embedding": (Spec("convolutions", 12.0, 4.2), *_layers(12)),
    "alternating": tuple(spec for index in range(11) for spec in _layer(index, 1 if index % 2 else 4)),
    "one giant": (*_layers(4), *_giant(4), *[spec for index in range(5, 12) for spec in _layer(index)]),
    "slow device": tuple(_layers(12)),
}


class SleepingBlock(nn.Module):
    """Sleep, and multiply by one of the block's parameters, so that there is something to learn.

    Args:
        forward_ms: how long one sample takes forward.
        num_parameters: of which one is used.
        held_floats: held for each sample until the backward, besides the input.
        slowdowns: how many times as long it takes, by rank.
    """

    def __init__(self, forward_ms: float, num_parameters: int, held_floats: int, slowdowns: dict[int, float]) -> None:
        super().__init__()
        self.forward_ms, self.held_floats = forward_ms, held_floats
        self.weight = nn.Parameter(torch.ones(num_parameters))
        self._slowdowns = slowdowns

    def reset_parameters(self) -> None:
        """Start as the identity."""
        nn.init.ones_(self.weight)

    def forward(self, value: Tensor) -> Tensor:
        """Return `value` times the weight, after the forward's time on this rank's device."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        time_ms = self.forward_ms * len(value) * self._slowdowns.get(rank, 1.0)
        result: Tensor = _Sleep.apply(value, self.weight, time_ms, self.held_floats)  # type: ignore[no-untyped-call]
        return result


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor, forward_ms: float, held_floats: int) -> Tensor:
        ctx.save_for_backward(value, weight, *([value.new_empty(len(value), held_floats)] if held_floats else []))
        ctx.forward_ms = forward_ms
        _sleep(forward_ms, value)
        return value * weight[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        value, weight, *_ = ctx.saved_tensors
        _sleep(2 * ctx.forward_ms, gradient)
        to_weight = torch.zeros_like(weight)
        to_weight[0] = torch.dot(gradient.flatten(), value.flatten())
        return gradient * weight[0] if ctx.needs_input_grad[0] else None, to_weight, None, None


def _sleep(milliseconds: float, tensor: Tensor) -> None:
    if not tensor.is_meta:
        time.sleep(milliseconds / 1e3)


def chain(name: str, microbatch_size: int = 1, parameter_scale: float = 1e-3, held_values: int = 0) -> Chain:
    """Return one of `CHAINS`, with a loss that costs next to nothing.

    Args:
        name: of the chain.
        microbatch_size: samples whose microbatch takes the times of the chain, and crosses a cut with `WIDTH` numbers.
        parameter_scale: of the real blocks' parameters, the share that these have.
        held_values: what a block holds until its backward besides its input, as a multiple of that.
    """
    slowdowns = {SLOW_RANK: SLOWDOWN} if name == "slow device" else {}
    held = held_values * WIDTH // microbatch_size
    blocks = [
        Block(
            spec.name,
            partial(
                SleepingBlock,
                spec.forward_ms / microbatch_size,
                round(1e6 * parameter_scale * spec.millions),
                held,
                slowdowns,
            ),
            ("hidden" if index else "input",),
            ("hidden",),
        )
        for index, spec in enumerate(CHAINS[name])
    ]
    return Chain(tuple(blocks), ("input",), CallableLoss(_mean, ("hidden",)))


def _mean(output: Tensor) -> Tensor:
    return output.mean()


def data(split: str, num_samples: int = 64, microbatch_size: int = 1) -> dict[str, Tensor] | None:
    """Return samples of ones, for `chain` with the same `microbatch_size`; nothing to evaluate on."""
    return {"input": torch.ones(num_samples, WIDTH // microbatch_size)} if split == "train" else None


def ideal_ms(specs: Sequence[Spec], speeds: Sequence[float]) -> float:
    """Return the time per microbatch and rank if the work could be spread perfectly."""
    return 3 * sum(spec.forward_ms for spec in specs) / sum(speeds)
