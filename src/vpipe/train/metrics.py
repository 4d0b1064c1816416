"""How quick a run is and how much memory it takes, while it trains."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vpipe.runtime.comm.world import World

__all__ = ["ThroughputMeter", "peak_memory_bytes"]

_PROCESS_STATUS = Path("/proc/self/status")


class _Mark(NamedTuple):
    samples: int
    seconds: float


class ThroughputMeter:
    """Samples per second now, and the mean time of an iteration in the steady state.

    A run is one or more *stretches*, at whose ends the pipeline is empty: call `begin` at each start. An iteration's
    time is that from the end of the one before it, so a stretch's first, in which the pipeline fills, never counts;
    neither does the run's second, which is slower, nor the last `num_draining` of a stretch, where others are left, nor
    one of a batch that is not whole.
    """

    def __init__(self, num_draining: int = 0, window: int = 10, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._num_draining = num_draining
        self._paused_seconds = 0.0
        self._recent = deque([_Mark(0, clock())], maxlen=window + 1)
        self._ends: list[float] = []
        self._short: list[int] = []
        self._is_first_stretch = True
        self._finished = (0, 0.0)

    def begin(self) -> None:
        """Start a stretch."""
        self._finished = self._counted()
        self._is_first_stretch = self._is_first_stretch and not self._ends
        self._ends, self._short = [], []

    def update(self, num_samples: int, *, is_whole: bool = True) -> None:
        """Note that an iteration of `num_samples` has just ended, of a batch that is whole or not."""
        now = self._clock()
        if not is_whole:
            self._short.append(len(self._ends))
        self._ends.append(now)
        self._recent.append(_Mark(self._recent[-1].samples + num_samples, now - self._paused_seconds))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of something else than training, such as an evaluation or a checkpoint."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused_seconds += self._clock() - start

    @property
    def samples_per_second(self) -> float:
        """The rate over the latest iterations; 0 before the first."""
        first, last = self._recent[0], self._recent[-1]
        return (last.samples - first.samples) / (last.seconds - first.seconds) if last.seconds > first.seconds else 0.0

    @property
    def iteration_ms(self) -> float | None:
        """The mean time of an iteration in the steady state; None while no iteration counts."""
        iterations, seconds = self._counted()
        return seconds * 1e3 / iterations if iterations else None

    def _counted(self) -> tuple[int, float]:
        """Return how many iterations count, and their time."""
        ends, (iterations, seconds) = self._ends, self._finished
        first = 1 if self._is_first_stretch and len(ends) > 2 + self._num_draining else 0
        last = len(ends) - 1
        if last - self._num_draining > first:
            last -= self._num_draining
        if last <= first:
            return self._finished
        short = [index for index in self._short if first < index <= last]
        left_out = sum(ends[index] - ends[index - 1] for index in short)
        return iterations + last - first - len(short), seconds + ends[last] - ends[first] - left_out


def peak_memory_bytes(world: World | None = None) -> int:
    """Return the most memory this process ever held: of the world's GPU for tensors, or else all that was resident."""
    if world is not None and world.device.type == "cuda":
        return world.peak.most()
    try:
        # Better than getrusage on Linux, where a new process starts with the peak of the one that started it.
        for line in _PROCESS_STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
