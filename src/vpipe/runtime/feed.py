"""Batches in, fields of microbatches out; nothing is read that the rank does not need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from vpipe.errors import DataError
from vpipe.runtime.batch import Batch

__all__ = ["BatchFeed", "split_rows"]


def split_rows(num_rows: int, num_microbatches: int) -> tuple[slice, ...]:
    """Cut `num_rows` into equal consecutive microbatches.

    Raises:
        DataError: the rows cannot be shared out equally.
    """
    size, rest = divmod(num_rows, num_microbatches)
    if rest or not size:
        raise DataError(
            f"a batch of {num_rows} samples cannot be cut into {num_microbatches} equal microbatches; "
            f"use {max(size, 1) * num_microbatches} samples or another num_microbatches"
        )
    return tuple(slice(index * size, (index + 1) * size) for index in range(num_microbatches))


@dataclass
class _Loaded:
    fields: Mapping[str, Tensor]
    rows: tuple[slice, ...]
    readers_left: int


class BatchFeed:
    """Give stages the batch fields of numbered microbatches.

    `batches` are read in order, each once, and dropped after `num_readers` stages have read all of its microbatches.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        num_microbatches: int,
        num_readers: int,
        move: Callable[[Tensor], Tensor],
    ) -> None:
        self._batches = iter(batches)
        self._num_microbatches = num_microbatches
        self._num_readers = num_readers
        self._move = move
        self._loaded: dict[int, _Loaded] = {}
        self._next = 0

    def _batch(self, index: int) -> _Loaded:
        while self._next <= index:
            batch = next(self._batches, None)
            if batch is None:
                raise DataError(f"batch {self._next} was expected but the data ended; give a num_batches that exists")
            moved = {name: self._move(tensor) for name, tensor in batch.fields.items()}
            rows = split_rows(batch.num_samples, self._num_microbatches)
            self._loaded[self._next] = _Loaded(moved, rows, self._num_readers * self._num_microbatches)
            self._next += 1
        return self._loaded[index]

    def rows(self, serials: Sequence[int], names: Iterable[str]) -> tuple[dict[str, Tensor], int]:
        """Return fields `names` of consecutive microbatches of one batch, and their number of samples."""
        index, first = divmod(serials[0], self._num_microbatches)
        batch = self._batch(index)
        start, stop = batch.rows[first].start, batch.rows[first + len(serials) - 1].stop
        return {name: batch.fields[name][start:stop] for name in names}, stop - start

    def done(self, serial: int) -> None:
        """Say that one stage has read microbatch `serial` for the last time."""
        index = serial // self._num_microbatches
        self._loaded[index].readers_left -= 1
        if not self._loaded[index].readers_left:
            del self._loaded[index]
