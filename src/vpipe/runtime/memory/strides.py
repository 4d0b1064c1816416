"""How tensors lie in memory, of which kernels choose how they compute."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_dense", "laid_out"]

_GRAIN = 16
"""Elements. A gap that is larger is as good as one that is shorter by a multiple of this."""


def is_dense(value: Tensor) -> bool:
    """Tell whether the elements of `value` lie side by side, in any order of its dimensions."""
    expected = 1
    for size, step in sorted(zip(value.shape, value.stride(), strict=True), key=lambda pair: (pair[1], pair[0])):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


def laid_out(value: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Copy a value to memory where it lies as a tensor of this `stride` does.

    That may be with gaps, though no wider than they have to be for the same kernels, or with one element in many
    places.
    """
    shape = value.shape
    for dim, step in enumerate(stride):
        if not step:
            value = value.narrow(dim, 0, min(1, shape[dim]))
    copied = torch.empty_strided(value.shape, _closer(value.shape, stride), dtype=value.dtype, device=value.device)
    return copied.copy_(value).expand(shape)


def _closer(shape: torch.Size, stride: tuple[int, ...]) -> list[int]:
    """Return strides in the same order, and equal but for a multiple of the grain, with small gaps."""
    found = list(stride)
    extent = 1
    for dim in sorted(range(len(shape)), key=lambda dim: (stride[dim], shape[dim])):
        if shape[dim] > 1 and stride[dim] > extent:
            found[dim] = min(stride[dim], stride[dim] - (stride[dim] - extent - 1) // _GRAIN * _GRAIN)
        if shape[dim] > 1:
            extent = max(extent, 1 + (shape[dim] - 1) * found[dim] + (extent - 1))
    return found
