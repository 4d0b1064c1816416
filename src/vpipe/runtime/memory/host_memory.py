"""Where activations go that leave the device: pinned memory beside a GPU, a mapped file on disk beside a CPU."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vpipe.errors import ConfigError, ExecutionError

__all__ = ["HostMemory", "MappedMemory", "PinnedMemory"]


class HostMemory(Protocol):
    """Regions of bytes that are used again and again."""

    def take(self, num_bytes: int) -> Tensor:
        """Return a region of so many bytes that nobody else has."""

    def give(self, region: Tensor) -> None:
        """Hand a region back."""


class MappedMemory:
    """Regions of a nameless file in `directory` (None: the system's for temporary files), mapped into memory.

    The file has no name, so it ends with the process, however that ends. What is written reaches the disk when the
    kernel needs the memory for something else.

    Raises:
        ConfigError: no file can be made there.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = Path(tempfile.gettempdir() if directory is None else directory)
        try:
            self._file = tempfile.TemporaryFile(prefix="vpipe-", dir=self._directory)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"swapped activations cannot be kept in '{self._directory}' ({error.strerror}); give a "
                "swap_directory that exists and can be written to"
            ) from error
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.num_bytes = 0
        """How large the file is."""

    def take(self, num_bytes: int) -> Tensor:
        """Return a region of so many bytes that nobody else has.

        Raises:
            ExecutionError: the disk is full.
        """
        size = -(-num_bytes // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        region = self._free[size].pop() if self._free[size] else self._grow(size)
        return region[:num_bytes]

    def give(self, region: Tensor) -> None:
        """Hand a region back."""
        whole = torch.empty(0, dtype=torch.uint8).set_(region.untyped_storage())
        self._free[whole.numel()].append(whole)

    def _grow(self, size: int) -> Tensor:
        try:
            # Without the blocks on disk, writing to the map would kill the process when the disk is full.
            os.posix_fallocate(self._file.fileno(), self.num_bytes, size)
        except OSError as error:
            raise ExecutionError(
                f"swapping needs {self.num_bytes + size:,} bytes in '{self._directory}' and cannot have them "
                f"({error.strerror}); make room there, give another swap_directory, or let fewer blocks swap"
            ) from error
        area = mmap.mmap(self._file.fileno(), size, offset=self.num_bytes)
        self.num_bytes += size
        return torch.frombuffer(area, dtype=torch.uint8)


class PinnedMemory:
    """Regions of page-locked memory, which a GPU copies from and to by itself."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.num_bytes = 0
        """How much was ever allocated."""

    def take(self, num_bytes: int) -> Tensor:
        """Return a region of so many bytes that nobody else has."""
        if self._free[num_bytes]:
            return self._free[num_bytes].pop()
        self.num_bytes += num_bytes
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def give(self, region: Tensor) -> None:
        """Hand a region back."""
        self._free[region.numel()].append(region)
