"""What a plain loop makes of a loss: the share of each microbatch in that of its batch, and how many targets it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Plain", "TwoParts", "added", "averaged", "counted", "two_parts"]

Fields = Mapping[str, Tensor]


@dataclass(frozen=True)
class Plain:
    """The shares of a loss and the counts of its targets."""

    shares: Callable[[tuple[Tensor, ...], Fields, Sequence[float]], list[Tensor]]
    count: Callable[[Fields], list[float]]


def averaged(
    function: Callable[..., Tensor], reads: Sequence[str] = ("target",), count: Callable[[Fields], float] | None = None
) -> Plain:
    """Take a mean, over samples or what `count` counts: microbatches weigh by how much they have of it."""

    def own(fields: Fields) -> float:
        return float(len(fields[reads[0]])) if count is None else float(count(fields))

    def shares(outputs: tuple[Tensor, ...], fields: Fields, totals: Sequence[float]) -> list[Tensor]:
        value = function(*outputs, *(fields[name] for name in reads)).reshape(())
        mine, (total,) = own(fields), totals
        if not mine:
            return [torch.zeros_like(value)]
        return [value if mine == total else value * (mine / total)]

    return Plain(shares, lambda fields: [own(fields)])


def added(function: Callable[..., Tensor]) -> Plain:
    """Take a loss that adds over samples."""

    def shares(outputs: tuple[Tensor, ...], fields: Fields, totals: Sequence[float]) -> list[Tensor]:
        return [function(*outputs, fields["target"])]

    return Plain(shares, lambda fields: [float(len(fields["target"]))])


def counted(mean: Callable[..., Tensor], summed: Callable[..., Tensor], count: Callable[[Tensor], float]) -> Plain:
    """Take a mean over targets of which some do not count: what a microbatch adds up, by the count of the batch."""

    def shares(outputs: tuple[Tensor, ...], fields: Fields, totals: Sequence[float]) -> list[Tensor]:
        (total,) = totals
        if count(fields["target"]) == total > 0:
            return [mean(*outputs, fields["target"])]
        return [summed(*outputs, fields["target"]) / (total or 1.0)]

    return Plain(shares, lambda fields: [count(fields["target"])])


class TwoParts:
    """A loss of two parts, of words and of whole samples, as a `vpipe.Loss`: written without it."""

    inputs = ("words", "kind", "target", "label")
    parts = ("words", "kind")

    def count(self, fields: Fields, num_samples: int) -> dict[str, float]:
        """Count the words that are to be found, and the samples."""
        return {"words": float((fields["target"] != -100).sum()), "kind": float(num_samples)}

    def __call__(self, tensors: Fields, totals: Mapping[str, float], num_samples: int) -> dict[str, Tensor]:
        """Return both parts' shares."""
        words, kind = _sums(tensors["words"], tensors["kind"], tensors["target"], tensors["label"])
        return {"words": words / totals["words"], "kind": kind / totals["kind"]}


def two_parts() -> Plain:
    """Take the same by hand."""

    def shares(outputs: tuple[Tensor, ...], fields: Fields, totals: Sequence[float]) -> list[Tensor]:
        words, kind = outputs
        sums = _sums(words, kind, fields["target"], fields["label"])
        return [part / total for part, total in zip(sums, totals, strict=True)]

    def count(fields: Fields) -> list[float]:
        return [float((fields["target"] != -100).sum()), float(len(fields["label"]))]

    return Plain(shares, count)


def _sums(words: Tensor, kind: Tensor, target: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return (
        functional.cross_entropy(words.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum"),
        functional.cross_entropy(kind, label, reduction="sum"),
    )
