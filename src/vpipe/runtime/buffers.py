"""Message buffers that are reused as soon as nobody refers to them any more.

A host buffer is memory of a numpy array that torch tensors stand on. Every tensor made from it, views that autograd
keeps included, holds a reference to the array it was lent as, and a weak reference to that array tells when the last of
them is gone: nothing has to be released by hand, and a gradient that aliases a received message is never overwritten.
"""

from __future__ import annotations

import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["ALIGNMENT", "BufferPool"]

ALIGNMENT = 64
"""Bytes; as torch aligns its own tensors, because kernels may round differently on memory that lies otherwise."""


class _Memory:
    """Some bytes, and whether tensors stand on them."""

    def __init__(self, num_bytes: int) -> None:
        spacious = np.empty(num_bytes + ALIGNMENT - 1, dtype=np.uint8)
        start = -spacious.ctypes.data % ALIGNMENT
        self._bytes: NDArray[np.uint8] = spacious[start : start + num_bytes]
        self._lent: weakref.ref[NDArray[np.uint8]] | None = None

    @property
    def is_free(self) -> bool:
        return self._lent is None or self._lent() is None

    def lend(self) -> Tensor:
        array = self._bytes[:]
        self._lent = weakref.ref(array)
        return torch.from_numpy(array)


class BufferPool:
    """Hand out flat byte tensors of a given size on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memories: dict[int, list[_Memory]] = {}

    def take(self, num_bytes: int) -> Tensor:
        """Return an uninitialised uint8 tensor of `num_bytes`, on memory that nobody uses."""
        if self._device.type != "cpu":
            # The device's caching allocator already reuses memory, in stream order.
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        memories = self._memories.setdefault(num_bytes, [])
        memory = next((memory for memory in memories if memory.is_free), None)
        if memory is None:
            memory = _Memory(num_bytes)
            memories.append(memory)
        return memory.lend()

    @property
    def num_bytes(self) -> int:
        """Return the bytes that the pool holds, in use or not."""
        return sum(size * len(memories) for size, memories in self._memories.items())
