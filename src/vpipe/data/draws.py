"""Random numbers by address: what is drawn for a sample depends on where it stands, never on who asks or when.

numpy's Philox generator is a function of a key and a counter, and its raw output is the same in every numpy version
(unlike that of the distributions on top of it), so that a seed means the same everywhere.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

__all__ = ["Stream", "raw_draws", "uniform_rows"]

_WORD = (1 << 64) - 1


class Stream(IntEnum):
    """What the numbers are for; streams of one seed are independent."""

    ORDER = 1
    SPLIT = 2
    PAIRS_TRAIN = 3
    PAIRS_EVAL = 4
    MASK_TRAIN = 5
    MASK_EVAL = 6
    SHUFFLE_TRAIN = 7
    SHUFFLE_EVAL = 8
    SYNTHETIC = 9
    SYNTHETIC_MASK = 10


def raw_draws(seed: int, stream: Stream, epoch: int, index: int, count: int) -> NDArray[np.uint64]:
    """Return `count` 64-bit numbers that belong to sample `index` in `epoch`."""
    key = (seed & _WORD) | (int(stream) << 64)
    counter = (int(index) << 64) | (int(epoch) << 128)
    return np.asarray(np.random.Philox(key=key, counter=counter).random_raw(count), dtype=np.uint64)


def uniform_rows(seed: int, stream: Stream, epoch: int, rows: NDArray[np.int64], width: int) -> NDArray[np.float64]:
    """Return `width` numbers in [0, 1) for each sample in `rows`, as an array of shape (len(rows), width)."""
    raw = np.empty((len(rows), width), dtype=np.uint64)
    for position, row in enumerate(rows.tolist()):
        raw[position] = raw_draws(seed, stream, epoch, row, width)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
