"""Losses that do not depend on how a batch is cut into microbatches.

A loss is a sum of parts (BERT: masked tokens and next sentence), each normalised by the count of its targets in the
whole batch. A microbatch contributes its share; the shares of all microbatches add up to the batch's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vpipe.errors import ModelError

__all__ = ["CallableLoss", "Loss", "sum_parts"]


class Loss(Protocol):
    """What the last stage computes for one microbatch."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Name the values and batch fields that the loss reads."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Name the parts, in the order in which they are added; known on every rank before anything has run."""

    def count(self, fields: Mapping[str, Tensor], num_samples: int) -> dict[str, float]:
        """Count the targets of each part in these batch fields; counts of microbatches add up."""

    def __call__(
        self, tensors: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        """Return each part's share: its sum over this microbatch, divided by the part's total."""


@dataclass(frozen=True)
class CallableLoss:
    """Wrap a function that returns the mean over the samples it is given, such as those of `torch.nn.functional`."""

    function: Callable[..., Tensor]
    inputs: tuple[str, ...] = ("hidden", "target")
    parts: tuple[str, ...] = ("loss",)

    def count(self, fields: Mapping[str, Tensor], num_samples: int) -> dict[str, float]:
        """Count samples."""
        return {"loss": float(num_samples)}

    def __call__(
        self, tensors: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        """Return the mean over this microbatch, weighted by its share of the batch's samples.

        Raises:
            ModelError: the function does not return one number.
        """
        mean = self.function(*(tensors[name] for name in self.inputs))
        if not isinstance(mean, Tensor) or mean.numel() != 1:
            got = f"a tensor of shape {tuple(mean.shape)}" if isinstance(mean, Tensor) else type(mean).__name__
            raise ModelError(
                f"the loss function returned {got}; it must return a tensor with one number, the mean over the samples "
                "it is given (reduction='mean')"
            )
        share = num_samples / totals["loss"]
        number = mean.reshape(()) if mean.dim() else mean
        # Where a microbatch is an update of its own there is nothing to weigh, nor to undo in the backward.
        return {"loss": number if share == 1 else number * share}


def sum_parts(parts: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
    """Add a loss's parts in their order.

    Raises:
        ModelError: there are none.
    """
    tensors = list(parts.values()) if isinstance(parts, Mapping) else list(parts)
    if not tensors:
        raise ModelError("the loss returned no parts; it must return at least one, such as {'loss': value}")
    total = tensors[0]
    for part in tensors[1:]:
        total = total + part
    return total
