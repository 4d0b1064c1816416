"""Which samples make which batch: the same on every rank, and for every number of stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vpipe.data.order import sample_order
from vpipe.errors import ConfigError, DataError

__all__ = [
    "TrainingBatch",
    "batch_indices",
    "evaluation_batches",
    "iterate_batches",
    "microbatch_rows",
    "num_iterations",
    "num_samples_read",
]


@dataclass(frozen=True)
class TrainingBatch:
    """The samples of one iteration, before they are cut into microbatches."""

    epoch: int
    iteration: int
    indices: NDArray[np.int64]


def num_iterations(num_samples: int, batch_size: int, num_microbatches: int = 1, *, drop_last: bool = False) -> int:
    """Count the batches of one epoch, of which the last may be smaller.

    With `drop_last` it is left out: its samples are read in other epochs, which have another order. `num_microbatches`
    is what a batch is cut into, for the advice in the error.

    Raises:
        ConfigError: the batch size is below 1.
        DataError: there are fewer samples than a batch needs.
    """
    _check_batch_size(batch_size)
    if num_samples < batch_size:
        most = num_samples // num_microbatches * num_microbatches
        fix = f"use a batch_size of at most {most}" if most else f"use at most {num_samples} microbatches"
        raise DataError(
            f"train.batch_size is {batch_size} but the data has {num_samples} samples; {fix}"
            f"{f' ({num_microbatches} microbatches)' * (0 < most < num_samples)}, or more data (more text, or "
            "data.synthetic_samples)"
        )
    return num_samples // batch_size if drop_last else -(-num_samples // batch_size)


def num_samples_read(iterations: int, num_samples: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Count the samples of so many iterations from the first on."""
    per_epoch = num_iterations(num_samples, batch_size, drop_last=drop_last)
    epochs, rest = divmod(iterations, per_epoch)
    return epochs * min(num_samples, per_epoch * batch_size) + rest * batch_size


def batch_indices(
    seed: int, epoch: int, iteration: int, batch_size: int, num_samples: int, *, drop_last: bool = False
) -> NDArray[np.int64]:
    """Return the samples of batch `iteration` (from 0) of `epoch`.

    Raises:
        DataError: the epoch has no such iteration.
    """
    available = num_iterations(num_samples, batch_size, drop_last=drop_last)
    if not 0 <= iteration < available:
        raise DataError(f"iteration {iteration} was asked for; an epoch has iterations 0 to {available - 1}")
    return _order(seed, epoch, num_samples)[iteration * batch_size : (iteration + 1) * batch_size]


def iterate_batches(
    *, seed: int, num_samples: int, batch_size: int, epochs: int | None = None, start: int = 0, drop_last: bool = False
) -> Iterator[TrainingBatch]:
    """Yield batches epoch after epoch, from iteration `start` counted over all epochs; without `epochs`, endlessly."""
    per_epoch = num_iterations(num_samples, batch_size, drop_last=drop_last)
    step = start
    while epochs is None or step < epochs * per_epoch:
        epoch, iteration = divmod(step, per_epoch)
        indices = batch_indices(seed, epoch, iteration, batch_size, num_samples, drop_last=drop_last)
        yield TrainingBatch(epoch, iteration, indices)
        step += 1


def evaluation_batches(
    num_samples: int, batch_size: int, max_batches: int | None = None
) -> Iterator[NDArray[np.int64]]:
    """Yield all samples once, in their stored order; the last batch may be short."""
    _check_batch_size(batch_size)
    starts = range(0, num_samples, batch_size)
    for start in starts if max_batches is None else starts[:max_batches]:
        yield np.arange(start, min(start + batch_size, num_samples), dtype=np.int64)


def microbatch_rows(batch_size: int, num_microbatches: int) -> tuple[slice, ...]:
    """Cut the rows of a batch into consecutive microbatches of sizes that differ by one at most, the larger ones first.

    Of fewer rows than microbatches the last microbatches have none.

    Raises:
        ConfigError: there are no microbatches.
    """
    if num_microbatches < 1:
        raise ConfigError(f"num_microbatches is {num_microbatches}; give a whole number of at least 1")
    size, rest = divmod(batch_size, num_microbatches)
    starts = [index * size + min(index, rest) for index in range(num_microbatches + 1)]
    return tuple(slice(start, stop) for start, stop in pairwise(starts))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"train.batch_size must be at least 1, got {batch_size}")


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    order = sample_order(seed, epoch, num_samples)
    order.flags.writeable = False
    return order
