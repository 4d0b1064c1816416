"""Batches in, fields of microbatches out; nothing is read or moved that the rank does not need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from vpipe.data.batches import microbatch_rows
from vpipe.errors import DataError
from vpipe.runtime.batch import Batch

__all__ = ["BatchFeed"]


@dataclass
class _Loaded:
    fields: Mapping[str, Tensor]
    whole: frozenset[str]
    readers_left: int


class BatchFeed:
    """Give stages the batch fields of microbatches, which are numbered through all batches.

    `batches` are read in order, each once, and dropped after all stages have read all of its microbatches. `readers`
    are the fields that each stage of this rank reads; `move` brings a field to the device. `reading` is around every
    look at `batches`, which is the caller's code.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        num_microbatches: int,
        readers: Sequence[Sequence[str]],
        move: Callable[[Tensor], Tensor],
        reading: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._batches = iter(batches)
        self._num_microbatches = num_microbatches
        self._num_readers = len(readers)
        self._names = tuple(dict.fromkeys(name for names in readers for name in names))
        self._move = move
        self._reading = reading
        self._rows: tuple[slice, ...] = ()
        self._loaded: dict[int, _Loaded] = {}
        self._num_read = 0
        self._first: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def rows(self, serial: int, names: Iterable[str]) -> tuple[dict[str, Tensor], int]:
        """Return fields `names` of microbatch `serial`, and its number of samples.

        Raises:
            ConfigError: the batch cannot be shared out equally.
            DataError: there is no such batch, it lacks a field, or is not as large as those before it.
        """
        index, position = divmod(serial, self._num_microbatches)
        while self._num_read <= index:
            self._read()
        rows = self._rows[position]
        loaded = self._loaded[index]
        fields = {
            name: _own(loaded.fields[name] if name in loaded.whole else loaded.fields[name][rows]) for name in names
        }
        return fields, rows.stop - rows.start

    def _read(self) -> None:
        index = self._num_read
        with self._reading():
            batch = next(self._batches, None)
        if batch is None:
            raise DataError(f"batch {index} was expected but the data ended; give a num_batches that exists")
        rows = microbatch_rows(batch.num_samples, self._num_microbatches)
        if self._rows and rows != self._rows:
            raise DataError(
                f"batch {index} has {batch.num_samples} samples and those before it {self._rows[-1].stop}; batches "
                "that share a pipeline must be equal in size: leave a short last one out (drop_last=True)"
            )
        if missing := [name for name in self._names if name not in batch.fields]:
            raise DataError(
                f"this rank reads the field '{missing[0]}', which batch {index} does not have; it has "
                f"{', '.join(sorted(batch.fields)) or 'none'}"
            )
        self._check_alike(index, batch)
        moved = {name: self._move(batch.fields[name]) for name in self._names}
        self._loaded[index] = _Loaded(moved, batch.whole, self._num_readers * self._num_microbatches)
        self._rows = rows
        self._num_read += 1

    def _check_alike(self, index: int, batch: Batch) -> None:
        """Refuse other shapes than those of the first batch: what crosses the cuts was agreed on for these."""
        shapes = {name: batch.fields[name].shape[0 if name in batch.whole else 1 :] for name in self._names}
        alike = {name: (shape, batch.fields[name].dtype) for name, shape in shapes.items()}
        first = self._first = self._first or alike
        if other := [name for name in self._names if alike[name] != first[name]]:
            (shape, dtype), (usual, kind) = alike[other[0]], first[other[0]]
            raise DataError(
                f"batch {index} has rows of shape {tuple(shape)} ({dtype}) in the field '{other[0]}', and those before "
                f"it {tuple(usual)} ({kind}); batches that share a pipeline, as those of one train() of an "
                "asynchronous schedule do, need one shape: pad them, or call train() once for each shape"
            )

    def done(self, serial: int) -> None:
        """Say that one stage has read microbatch `serial` for the last time."""
        index = serial // self._num_microbatches
        self._loaded[index].readers_left -= 1
        if not self._loaded[index].readers_left:
            del self._loaded[index]


def _own(part: Tensor) -> Tensor:
    """Return a microbatch's part of a field; a change of it in place is none of the others', as autograd counts it."""
    return part if part.requires_grad else part.data
