"""What an action needs for a moment, on top of what is held before or after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.autograd.profiler import profile

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

    def run(self, handler: Callable[[Action], None], action: Action) -> int:
        """Do an action; return the bytes by which its peak exceeds both what was held before and what is after."""
        key = action.stage, action.kind
        if action.kind not in COMPUTE:
            handler(action)
            return 0
        if self._taken[key] < _NUM_SAMPLES and not torch._C._autograd._profiler_enabled():
            self._taken[key] += 1
            found = self._on_gpu(handler, action) if self._device.type == "cuda" else self._on_cpu(handler, action)
            self._largest[key] = max(self._largest.get(key, 0), found)
        else:
            handler(action)
        return self._largest.get(key, 0)

    def _on_cpu(self, handler: Callable[[Action], None], action: Action) -> int:
        with profile(profile_memory=True) as watched:
            handler(action)
        assert watched.kineto_results is not None
        events = [event for event in watched.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        running = list(accumulate(event.nbytes() for event in events))
        return max(0, *running) - max(0, running[-1]) if running else 0

    def _on_gpu(self, handler: Callable[[Action], None], action: Action) -> int:
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        handler(action)
        after = torch.cuda.memory_allocated(self._device)
        return torch.cuda.max_memory_allocated(self._device) - max(before, after)
