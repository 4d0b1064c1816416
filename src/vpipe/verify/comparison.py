"""Two sets of named numbers, compared bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """How two sets of named numbers differ; `max_abs_difference` is None where one side is missing or not a number."""

    num_tensors: int
    num_different: int
    max_abs_difference: float | None
    first_different: str | None


def compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Comparison:
    """Compare tensors of equal name; a name on one side only counts as different."""
    one_sided = [name for name in (*expected, *found) if (name in found) != (name in expected)]
    unequal = [name for name in expected if name in found and not _same_bits(found[name], expected[name])]
    differences = [_largest_difference(found[name], expected[name]) for name in unequal]
    largest: float | None = max(differences, default=0.0)
    if one_sided or not all(map(math.isfinite, differences)):
        largest = None
    first = next(iter(unequal), None)
    if one_sided:
        first = f"{one_sided[0]} (only in {'one process' if one_sided[0] in expected else 'the pipeline'})"
    return Comparison(len(expected), len(unequal) + len(one_sided), largest, first)


def _same_bits(found: Tensor, expected: Tensor) -> bool:
    """Tell whether two tensors hold the same bits, so that NaN equals itself and 0.0 is not -0.0."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return torch.equal(*(tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected)))


def _largest_difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    wide = torch.complex128 if found.is_complex() or expected.is_complex() else torch.float64
    return float((found.cpu().to(wide) - expected.cpu().to(wide)).abs().max())
