"""Where batches come from: a source gives rows by number, and only the fields asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpipe.errors import DataError

__all__ = ["ArraySource", "BatchSource", "FieldSpec", "Indices", "check_fields", "row_numbers"]

Indices = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class FieldSpec:
    """What one sample of a batch field looks like: `(128,)` for 128 token ids, `()` for one label."""

    shape_per_sample: tuple[int, ...]
    dtype: torch.dtype

    def shape(self, num_samples: int) -> tuple[int, ...]:
        """Return the shape of the field in a batch of `num_samples`."""
        return (num_samples, *self.shape_per_sample)


@runtime_checkable
class BatchSource(Protocol):
    """A numbered set of samples that every rank can read by itself.

    The same indices and epoch give the same values in every process, whatever fields are asked for together: stages
    read their fields separately and never send them to each other.
    """

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        """Name the fields and describe one sample of each."""

    @property
    def num_samples(self) -> int:
        """Count the samples."""

    def batch(self, indices: Indices, fields: Sequence[str], *, epoch: int = 0) -> dict[str, Tensor]:
        """Return `fields` of the samples `indices`, rows in that order, as they are in `epoch`."""


def check_fields(known: Mapping[str, FieldSpec], asked: Sequence[str]) -> None:
    """Raise DataError for a field that the source does not have."""
    for name in asked:
        if name not in known:
            raise DataError(f"the data has no field '{name}'; it has {', '.join(known)}")


def row_numbers(indices: Indices, num_samples: int) -> NDArray[np.int64]:
    """Return `indices` as an array.

    Raises:
        DataError: one of them is outside 0 to `num_samples - 1`.
    """
    rows = np.asarray(indices, dtype=np.int64).reshape(-1)
    outside = rows[(rows < 0) | (rows >= num_samples)]
    if outside.size:
        raise DataError(f"sample {outside[0]} was asked for; the data has samples 0 to {num_samples - 1}")
    return rows


class ArraySource:
    """A source over one array or tensor per field, in memory or memory-mapped, samples along the first dimension.

    Raises:
        DataError: no fields, no samples, fields with different numbers of samples, or arrays of no numbers.
    """

    def __init__(self, arrays: Mapping[str, NDArray[np.generic] | Tensor]) -> None:
        sizes = {name: len(array) for name, array in arrays.items()}
        if not sizes or len(set(sizes.values())) > 1 or 0 in sizes.values():
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items()) or "no fields"
            raise DataError(f"every field needs the same number of samples, at least 1; got {listed}")
        self._arrays = dict(arrays)
        self.num_samples = next(iter(sizes.values()))
        probes = {name: _rows(array, np.zeros(1, dtype=np.int64)) for name, array in arrays.items()}
        self.fields: Mapping[str, FieldSpec] = {
            name: FieldSpec(tuple(probe.shape[1:]), probe.dtype) for name, probe in probes.items()
        }

    def batch(self, indices: Indices, fields: Sequence[str], *, epoch: int = 0) -> dict[str, Tensor]:
        """Return copies of the rows; they are the same in every epoch."""
        check_fields(self.fields, fields)
        rows = row_numbers(indices, self.num_samples)
        return {name: _rows(self._arrays[name], rows) for name in fields}


def _rows(array: NDArray[np.generic] | Tensor, rows: NDArray[np.int64]) -> Tensor:
    if isinstance(array, Tensor):
        return array[torch.from_numpy(rows.copy())]  # torch warns of arrays that are not writable
    if array.dtype.kind not in "biuf":
        raise DataError(f"an array of {array.dtype} cannot become a tensor; use numbers or booleans")
    return torch.from_numpy(np.asarray(array[rows]))
