"""In which order the samples of an epoch are read."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vpipe.data.draws import Stream, raw_draws

__all__ = ["sample_order", "shuffled"]


def sample_order(seed: int, epoch: int, num_samples: int) -> NDArray[np.int64]:
    """Return the samples 0 to `num_samples - 1` in the order of `epoch`: a function of the arguments alone."""
    return shuffled(seed, Stream.ORDER, num_samples, epoch)


def shuffled(seed: int, stream: Stream, count: int, epoch: int = 0) -> NDArray[np.int64]:
    """Return a permutation of 0 to `count - 1`."""
    return np.argsort(raw_draws(seed, stream, epoch, 0, count), kind="stable").astype(np.int64)
