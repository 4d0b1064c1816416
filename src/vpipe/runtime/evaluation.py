"""The loss over held-out batches of any size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from vpipe.runtime.wait import telling_losses

__all__ = ["LossSums"]


class LossSums:
    """Adds up the parts of the loss, and what they have to be divided by; on the rank of the last stage."""

    def __init__(self, parts: Iterable[str]) -> None:
        self._sums = dict.fromkeys(parts, 0.0)
        self._counts = dict.fromkeys(self._sums, 0.0)

    def add(self, losses: Mapping[str, Tensor], counts: Mapping[str, float]) -> None:
        """Add one batch."""
        for name in self._sums:
            self._sums[name] += losses[name].item()
            self._counts[name] += counts[name]

    def means(self, source: int, group: dist.ProcessGroup | None) -> dict[str, float]:
        """Return the loss and its parts as rank `source` has them, on every rank of `group`; collective.

        A part of which there are no targets is NaN.
        """
        totals = torch.tensor([*self._sums.values(), *self._counts.values()], dtype=torch.float64)
        if group is not None:
            with telling_losses("the held-out loss"):
                dist.broadcast(totals, source, group=group)
        values, num_parts = totals.tolist(), len(self._sums)
        means = [
            total / count if count else math.nan
            for total, count in zip(values[:num_parts], values[num_parts:], strict=True)
        ]
        return {"loss": math.fsum(means), **dict(zip(self._sums, means, strict=True))}
