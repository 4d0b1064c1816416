"""What a run says about itself while it trains: lines of JSON, throughput, memory, and a loss that is a number."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch

from vpipe.errors import NonFiniteLossError

__all__ = ["MetricsWriter", "ThroughputMeter", "peak_memory_bytes", "validate_loss"]

_PROCESS_STATUS = Path("/proc/self/status")


class MetricsWriter:
    """Appends records to a file of one JSON object per line; a reader sees each one as soon as it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def write(self, record: Mapping[str, object]) -> None:
        """Write one record; JSON has no NaN and no infinity, so such values become null."""
        self._file.write(json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Mark(NamedTuple):
    iterations: int
    samples: int
    seconds: float


class ThroughputMeter:
    """Samples per second: of the latest `window` iterations, and of all but the first `skip`, which are slower.

    While there are no more than `skip` iterations, all of them count. Rates are 0 before the first.
    """

    def __init__(self, skip: int = 2, window: int = 10, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._skip = skip
        self._paused_seconds = 0.0
        self._made = clock()
        self._start = self._now = _Mark(0, 0, self._made)
        self._recent = deque([self._start], maxlen=window + 1)
        self._after_skip: _Mark | None = None

    def update(self, num_samples: int) -> None:
        """Note that an iteration of `num_samples` has just ended."""
        seconds = self._clock() - self._paused_seconds
        self._now = _Mark(self._now.iterations + 1, self._now.samples + num_samples, seconds)
        self._recent.append(self._now)
        if self._now.iterations > self._skip and self._after_skip is not None:
            self._start = self._after_skip
        if self._now.iterations == self._skip:
            self._after_skip = self._now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of something else than training, such as an evaluation or a checkpoint."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused_seconds += self._clock() - start

    @property
    def elapsed_s(self) -> float:
        """Seconds since the meter was made, pauses included."""
        return self._clock() - self._made

    @property
    def samples_per_second(self) -> float:
        """The rate over the latest iterations."""
        return _rate(self._now.samples - self._recent[0].samples, self._now.seconds - self._recent[0].seconds)

    @property
    def overall_samples_per_second(self) -> float:
        """The rate over the run, without its first iterations."""
        return _rate(self._now.samples - self._start.samples, self._now.seconds - self._start.seconds)

    @property
    def iteration_ms(self) -> float:
        """The mean time of an iteration over the run, without the first ones."""
        iterations = self._now.iterations - self._start.iterations
        return (self._now.seconds - self._start.seconds) * 1e3 / iterations if iterations else 0.0


def _rate(samples: int, seconds: float) -> float:
    return samples / seconds if seconds > 0 else 0.0


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Return the most memory this process ever held: of the GPU's for tensors, or on the CPU all that was resident."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        # Better than getrusage on Linux, where a new process starts with the peak of the one that started it.
        for line in _PROCESS_STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def validate_loss(loss: float, iteration: int, learning_rate: float | None = None) -> None:
    """Check that the loss is a number.

    Raises:
        NonFiniteLossError: it is NaN or infinite; the message says when and what to try.
    """
    if math.isfinite(loss):
        return
    rate = "" if learning_rate is None else f" with learning rate {learning_rate:g}"
    raise NonFiniteLossError(
        f"the loss became {loss} at iteration {iteration}{rate}; lower optimizer.learning_rate, raise "
        "optimizer.warmup_iterations, set optimizer.clip_grad_norm (1.0 is common), or look for empty or broken "
        "samples in the data"
    )
