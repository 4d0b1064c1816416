"""The model of the checks that use VPipe as a library: transformer layers between an embedding and an output matrix.

A batch is token ids and labels, next to nothing beside the activations: what is held or moved is the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["COMPUTING", "HOLDING", "TRIED", "Size", "compute_in_steps", "cross_entropy", "sgd", "warm_up"]

_VOCABULARY = 1024


@dataclass(frozen=True)
class Size:
    """The size of the model and of a batch."""

    hidden: int
    heads: int
    tokens: int
    batch: int
    layers: int
    num_microbatches: int = 8

    @property
    def num_blocks(self) -> int:
        """Count the blocks: embedding, layers, output."""
        return self.layers + 2

    def build_blocks(self, dropout: float) -> list[nn.Module]:
        """Build the blocks, with the same weights every time."""
        torch.manual_seed(0)
        width = 4 * self.hidden
        layers = [
            nn.TransformerEncoderLayer(self.hidden, self.heads, width, dropout, batch_first=True)
            for _ in range(self.layers)
        ]
        return [nn.Embedding(_VOCABULARY, self.hidden), *layers, nn.Linear(self.hidden, _VOCABULARY)]

    def build_batch(self) -> tuple[Tensor, Tensor]:
        """Return token ids and labels, each (batch, tokens), the same every time."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(_VOCABULARY, (2, self.batch, self.tokens), generator=generator)
        return ids[0], ids[1]


HOLDING = Size(hidden=512, heads=8, tokens=256, batch=32, layers=8)
"""Holds much more in activations than the allocator may round."""
COMPUTING = Size(hidden=2048, heads=16, tokens=256, batch=16, layers=6)
"""Computes long enough on what it saves for a copy to be hidden behind it."""
TRIED = Size(hidden=32, heads=2, tokens=32, batch=16, layers=4)
"""For a CPU, on which only the check itself is tried."""


def cross_entropy(output: Tensor, labels: Tensor) -> Tensor:
    """Return the mean over samples, which all have as many tokens."""
    return nn.functional.cross_entropy(output.flatten(0, 1), labels.flatten())


def sgd(parameters: object) -> torch.optim.Optimizer:
    """Make the optimizer of a stage."""
    return torch.optim.SGD(parameters, lr=1e-2)  # type: ignore[arg-type]


def compute_in_steps() -> None:
    """Let attention be computed step by step: fused, its backward adds in another order every time."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def warm_up(device: torch.device, size: Size) -> None:
    """Let libraries take the memory on a device that they keep: cuBLAS has some for each thread that computes."""
    layer = nn.TransformerEncoderLayer(size.hidden, size.heads, 4 * size.hidden, batch_first=True).to(device)
    layer(torch.zeros(1, size.tokens, size.hidden, device=device)).sum().backward()
    wait_for(device)()


def wait_for(device: torch.device) -> Callable[[], None]:
    """Return what waits until a device has done all that it was given."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
