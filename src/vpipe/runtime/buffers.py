"""Message buffers that are reused as soon as nobody refers to them any more.

A host buffer is a numpy array under torch tensors. Every tensor made from it, views that autograd keeps included, holds a
reference to the array, so its reference count says exactly when the memory may be written again: nothing has to be
released by hand, and a gradient that aliases a received message can never be overwritten.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

__all__ = ["BufferPool"]

# What sys.getrefcount reports for an array that only the pool's list holds: the list, the loop variable, the argument.
_UNUSED = 3


class BufferPool:
    """Hand out flat byte tensors of a given size on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arrays: dict[int, list[np.ndarray[tuple[int], np.dtype[np.uint8]]]] = {}

    def take(self, num_bytes: int) -> Tensor:
        """Return an uninitialised uint8 tensor of `num_bytes`, from memory that nobody uses."""
        if self._device.type != "cpu":
            # The device's caching allocator already reuses memory, in stream order.
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        arrays = self._arrays.setdefault(num_bytes, [])
        for array in arrays:
            if sys.getrefcount(array) <= _UNUSED:
                return torch.from_numpy(array)
        arrays.append(np.empty(num_bytes, dtype=np.uint8))
        return torch.from_numpy(arrays[-1])

    @property
    def num_bytes(self) -> int:
        """Return the bytes that the pool holds, in use or not."""
        return sum(size * len(arrays) for size, arrays in self._arrays.items())
