"""What an action needs for a moment, on top of what is held before or after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import accumulate

import torch
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig

from vpipe.schedule.action import COMPUTE, Action, Kind

__all__ = ["WorkspaceMeter"]

_NUM_SAMPLES = 3
"""Of each stage and kind of action; the second backward of a batch is the first that adds to gradients."""


class WorkspaceMeter:
    """Watches the allocator during the first few actions of each kind and stage, and takes later ones to be alike."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._largest: dict[tuple[int, Kind], int] = {}
        self._taken: Counter[tuple[int, Kind]] = Counter()
        self._latest: tuple[int, int] | None = None

    def run(self, handler: Callable[[Action], None], action: Action) -> None:
        """Do an action, and watch it if that is still needed and nobody else profiles."""
        key, self._latest = (action.stage, action.kind), None
        is_due = action.kind in COMPUTE and self._taken[key] < _NUM_SAMPLES
        if not is_due or torch._C._autograd._profiler_enabled():
            handler(action)
            return
        self._taken[key] += 1
        self._latest = self._on_gpu(handler, action) if self._device.type == "cuda" else _on_cpu(handler, action)

    def excess(self, action: Action, growth: int) -> int:
        """Return the bytes by which the action's peak exceeds both what was held before and what is held after it.

        `growth` is by how much more is held since. What the allocator says of that differs where an action freed what
        others had left, or read a batch: the larger of both counts.
        """
        key = action.stage, action.kind
        if self._latest is not None:
            peak, end = self._latest
            self._largest[key] = max(self._largest.get(key, 0), peak - max(0, end, growth))
        return self._largest.get(key, 0)

    def _on_gpu(self, handler: Callable[[Action], None], action: Action) -> tuple[int, int]:
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        handler(action)
        after = torch.cuda.memory_allocated(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before, after - before


def _on_cpu(handler: Callable[[Action], None], action: Action) -> tuple[int, int]:
    """Do an action; return by how much its peak, and its end, exceed its start."""
    # The newer profiler takes several times as long, and logs its own start and end to standard error.
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()))
    try:
        handler(action)
    finally:
        records = _disable_profiler_legacy()
    # `kind` is text, whatever torch's stub says.
    changes = [item.cpu_memory_usage() for thread in records for item in thread if str(item.kind()) == "memory_alloc"]
    running = [0, *accumulate(changes)]
    return max(running), running[-1]
