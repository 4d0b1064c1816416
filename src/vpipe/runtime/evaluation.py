"""The loss over held-out batches of any size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from vpipe.errors import ConfigError, DataError
from vpipe.model.loss import exact_sum
from vpipe.runtime.batch import Batch
from vpipe.runtime.comm.world import World
from vpipe.runtime.programs import ProgramBuilder

__all__ = ["LossSums", "Piece", "pieces_alike"]

_MOST_TOGETHER = 32
_MOST_WAITING = 4 * _MOST_TOGETHER
"""Pieces of several shapes that may wait for others like them, so that not all held-out data are in memory at once."""


class Piece(NamedTuple):
    """What is evaluated at once, and its number in the whole evaluation."""

    number: int
    batch: Batch


def pieces_alike(
    batches: Iterable[Batch], size: int | None, programs: ProgramBuilder, memory_limit: int | None
) -> Iterator[list[Piece]]:
    """Cut each batch from its start into pieces of `size` samples and a short last one; yield those alike together.

    Alike are those whose fields have the same shapes and types, so that the same messages carry them.

    Without a size a batch is cut as one for training, into `num_microbatches`. What was trained on before has no say:
    how large a piece is decides which kernels compute it, and so the bits of its loss. Nothing comes back from ranks
    behind that would hold up one that is ahead, so whatever is together may be under way at once: with a limit no more
    than in training, for which a plan has left room.

    Raises:
        ConfigError, DataError: the size is below 1; there are no batches.
    """
    if size is not None and size < 1:
        raise ConfigError(
            f"microbatch_size is {size}; give a number of samples above 0, or None: batches are cut as for training"
        )
    most = _MOST_TOGETHER if memory_limit is None else programs.window
    waiting: dict[object, list[Piece]] = {}
    numbers = count()
    for batch in batches:
        for part in _cut(batch, size or -(-batch.num_samples // programs.num_microbatches)):
            form = part.num_samples, *((name, item.shape, item.dtype) for name, item in sorted(part.fields.items()))
            alike = waiting.setdefault(form, [])
            alike.append(Piece(next(numbers), part))
            if len(alike) >= most:
                yield waiting.pop(form)
            elif sum(map(len, waiting.values())) >= _MOST_WAITING:
                yield waiting.pop(next(iter(waiting)))  # what has waited longest
    if not next(numbers):
        raise DataError("there are no batches to evaluate; an iterator that was read to its end has none left")
    yield from waiting.values()


def _cut(batch: Batch, size: int) -> Iterator[Batch]:
    if batch.num_samples <= size:
        yield batch
        return
    for start in range(0, batch.num_samples, size):
        stop = min(start + size, batch.num_samples)
        yield Batch(batch.rows(slice(start, stop)), stop - start, batch.whole)


class LossSums:
    """Adds up the parts of the loss, and what they have to be divided by; on the rank of the last stage."""

    def __init__(self, parts: Iterable[str]) -> None:
        self._losses: dict[str, list[float]] = {name: [] for name in parts}
        self._counts: dict[str, list[float]] = {name: [] for name in self._losses}

    def take(self, losses: dict[int, dict[str, Tensor]], counts: dict[int, dict[str, float]]) -> None:
        """Move what there is of microbatches here; their order makes no difference."""
        for serial in list(losses):
            parts, own = losses.pop(serial), counts.pop(serial)
            for name, values in self._losses.items():
                values.append(parts[name].item())
                self._counts[name].append(own[name])

    def means(self, source: int, world: World) -> dict[str, float]:
        """Return the loss and its parts as rank `source` has them, on every rank of `world`; collective.

        A part of which there are no targets is NaN.
        """
        totals = torch.tensor(
            [exact_sum(values) for values in (*self._losses.values(), *self._counts.values())], dtype=torch.float64
        )
        world.broadcast(totals, source, "the held-out loss")
        values, num_parts = totals.tolist(), len(self._losses)
        means = [
            total / targets if targets else math.nan
            for total, targets in zip(values[:num_parts], values[num_parts:], strict=True)
        ]
        return {"loss": exact_sum(means), **dict(zip(self._losses, means, strict=True))}
