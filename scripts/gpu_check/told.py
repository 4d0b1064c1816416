"""A model that writes into its rank's log where it computes, and data for it, as a run's YAML names them."""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor, nn

import vpipe

__all__ = ["chain", "data"]

_WIDTH = 64


class Telling(nn.Module):
    """A linear layer that says once on which device it is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(_WIDTH, _WIDTH)
        self._has_told = False

    def forward(self, value: Tensor) -> Tensor:
        """Return what the layer makes of `value`, of shape (samples, 64)."""
        if not self._has_told and not value.is_meta:
            self._has_told = True
            sys.stdout.write(f"rank {os.environ.get('RANK', '0')} computes on {self.linear.weight.device}\n")
            sys.stdout.flush()
        return torch.tanh(self.linear(value))


def chain() -> vpipe.Chain:
    """Return four such layers with a mean squared error."""
    return vpipe.Chain.from_modules([Telling() for _ in range(4)], vpipe.CallableLoss(nn.functional.mse_loss))


def data(split: str) -> dict[str, Tensor]:
    """Return samples whose targets are their inputs, turned round."""
    value = torch.randn(64, _WIDTH, generator=torch.Generator().manual_seed(len(split)))
    return {"input": value, "target": value.flip(1)}
