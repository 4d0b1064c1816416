"""Batches in, fields of microbatches out; nothing is read or moved that the rank does not need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from vpipe.data.batches import microbatch_rows
from vpipe.errors import DataError
from vpipe.model.chain import ValueSpec
from vpipe.model.nested import map_tensors
from vpipe.runtime.batch import Batch

__all__ = ["BatchFeed"]


_NOTHING: dict[int, tuple[ValueSpec, ...]] = {}
"""What crosses for a microbatch without samples."""


@dataclass
class _Loaded:
    fields: Mapping[str, Any]
    whole: frozenset[str]
    readers_left: int


class _Slices(NamedTuple):
    """How a batch is cut, and what crosses the cuts between stages for each microbatch."""

    rows: tuple[slice, ...]
    crossings: tuple[Mapping[int, Sequence[ValueSpec]], ...]
    num_filled: int
    """Microbatches that have samples: the first ones."""


class BatchFeed:
    """Give stages the batch fields of microbatches, which are numbered through all batches.

    `batches` are read in order, each once, and dropped after all stages have read all of its microbatches. `readers`
    are the fields that each stage of this rank reads; `move` brings a field to the device. `crossing` says what crosses
    the cuts for microbatches of so many samples of a batch. `reading` is around every look at `batches`, which is the
    caller's code. A batch may be read before its time where another rank needs it no more than `lead` microbatches
    later.
    """

    def __init__(
        self,
        batches: Iterable[Batch],
        num_microbatches: int,
        readers: Sequence[Sequence[str]],
        move: Callable[[Tensor], Tensor],
        crossing: Callable[[Batch, int], Mapping[int, Sequence[ValueSpec]]],
        reading: Callable[[], AbstractContextManager[None]] = nullcontext,
        lead: int = 0,
    ) -> None:
        self._batches = iter(batches)
        self._num_microbatches = num_microbatches
        self._num_readers = len(readers)
        self._names = tuple(dict.fromkeys(name for names in readers for name in names))
        self._move = move
        self._crossing = crossing
        self._reading = reading
        self._lead = lead
        self._slices: list[_Slices] = []
        self._cuts: dict[tuple[int, ...], _Slices] = {}
        self._loaded: dict[int, _Loaded] = {}

    def rows(self, serial: int, names: Iterable[str]) -> tuple[dict[str, Any], int]:
        """Return fields `names` of microbatch `serial`, and its number of samples.

        Raises:
            DataError: there is no such batch, or it lacks a field.
        """
        index, position = divmod(serial, self._num_microbatches)
        rows, loaded = self._slices_of(index).rows[position], self._loaded[index]
        fields = {name: _own(loaded.fields[name], None if name in loaded.whole else rows) for name in names}
        return fields, rows.stop - rows.start

    def crossing(self, serial: int) -> Mapping[int, Sequence[ValueSpec]]:
        """Return what crosses the cut in front of each stage for microbatch `serial`: nothing if it has no samples."""
        index, position = divmod(serial, self._num_microbatches)
        return self._slices_of(index).crossings[position]

    def has(self, serial: int) -> bool:
        """Tell whether microbatch `serial` has samples."""
        index, position = divmod(serial, self._num_microbatches)
        return position < self._slices_of(index).num_filled

    def count(self, index: int) -> int:
        """Count the microbatches of batch `index` that have samples."""
        return self._slices_of(index).num_filled

    def knows(self, serial: int, now: int) -> bool:
        """Tell whether the batch of `serial` is here, or may be read while microbatch `now` is waited for."""
        return serial // self._num_microbatches < len(self._slices) or serial - now <= self._lead

    def _slices_of(self, index: int) -> _Slices:
        while len(self._slices) <= index:
            self._read()
        return self._slices[index]

    def _read(self) -> None:
        index = len(self._slices)
        with self._reading():
            batch = next(self._batches, None)
        if batch is None:
            raise DataError(f"batch {index} was expected but the data ended; give a num_batches that exists")
        if missing := [name for name in self._names if name not in batch.fields]:
            raise DataError(
                f"this rank reads the field '{missing[0]}', which batch {index} does not have; it has "
                f"{', '.join(sorted(batch.fields)) or 'none'}"
            )
        slices = self._cut(batch)
        moved = {name: map_tensors(self._move, batch.fields[name]) for name in self._names}
        self._loaded[index] = _Loaded(moved, batch.whole, self._num_readers * slices.num_filled)
        self._slices.append(slices)

    def _cut(self, batch: Batch) -> _Slices:
        rows = microbatch_rows(batch.num_samples, self._num_microbatches)
        sizes = [part.stop - part.start for part in rows]
        found = {size: self._crossing(batch, size) if size else _NOTHING for size in set(sizes)}
        # Batches of one shape share theirs.
        key = batch.num_samples, *map(id, found.values())
        slices = _Slices(rows, tuple(found[size] for size in sizes), min(batch.num_samples, len(rows)))
        return self._cuts.setdefault(key, slices)

    def done(self, serial: int) -> None:
        """Say that one stage has read microbatch `serial` for the last time."""
        index = serial // self._num_microbatches
        self._loaded[index].readers_left -= 1
        if not self._loaded[index].readers_left:
            del self._loaded[index]


def _own(field: Any, rows: slice | None) -> Any:
    """Return a microbatch's part of a field; a change of it in place is none of the others', as autograd counts it."""
    if not isinstance(field, Tensor):
        return map_tensors(lambda tensor: _own(tensor, rows), field)
    part = field if rows is None else field[rows]
    return part if part.requires_grad else part.data
