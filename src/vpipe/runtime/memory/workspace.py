"""What an action needs for a moment, on top of what is held before or after it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch._C._autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig
from torch.autograd.profiler import record_function

from vpipe.runtime.torch_log import errors_only
from vpipe.schedule.action import COMPUTE, Action, Kind

__all__ = ["GpuPeak", "WorkspaceMeter"]

_NUM_SAMPLES = 3
"""Of each stage and kind of action."""
_NUM_FORWARDS = _NUM_SAMPLES + 1
"""So many, because the first backward is another kind than the next ones."""
_FREED = "vpipe frees bytes "

_Key = tuple[int, Kind, bool]


class GpuPeak:
    """The most bytes that this process's tensors ever took on a GPU, although single actions are watched, too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def reset(self) -> None:
        """Let torch look for the peak anew; `most` still knows of those before."""
        self._before = self.most()
        torch.cuda.reset_peak_memory_stats(self._device)

    def most(self) -> int:
        """Return the highest peak."""
        return max(self._before, torch.cuda.max_memory_allocated(self._device))


class WorkspaceMeter:
    """Watches the allocator during the first few actions of each kind and stage, and takes later ones to be alike."""

    def __init__(self, device: torch.device, peak: GpuPeak | None = None) -> None:
        self._device = device
        self._peak = peak or GpuPeak(device)
        self._largest: dict[_Key, int] = {}
        self._taken: Counter[_Key] = Counter()
        self._key: _Key = (0, Kind.F, False)
        self._latest: tuple[int, int] | None = None
        self._expected: list[weakref.ref[object]] = []
        self._known: set[tuple[int, int]] = set()
        """Stage and microbatch of the forwards that were watched."""

    def run(self, handler: Callable[[Action], None], action: Action, *, has_gradients: bool) -> None:
        """Do an action, and watch it if that is still needed and nobody else profiles.

        A backward that adds to gradients needs something else than one that makes them.
        """
        key, self._latest = (action.stage, action.kind, has_gradients), None
        self._key = key
        if not self._is_due(action, key) or torch._C._autograd._profiler_enabled():
            handler(action)
            return
        self._taken[key] += 1
        self._latest = self._on_gpu(handler, action) if self._device.type == "cuda" else _on_cpu(handler, action)

    def _is_due(self, action: Action, key: _Key) -> bool:
        owner, is_forward = (action.stage, action.microbatch), action.kind is Kind.F
        is_due = action.kind in COMPUTE and self._taken[key] < (_NUM_FORWARDS if is_forward else _NUM_SAMPLES)
        if is_forward:
            (self._known.add if is_due else self._known.discard)(owner)
        # The allocator only tells of frees whose allocation it was watched for.
        return is_due and (owner in self._known or action.kind is Kind.STEP)

    def expect(self, owner: object, num_bytes: int) -> None:
        """Say that memory was allocated elsewhere, where nobody watched, and is freed together with `owner`."""
        if self._device.type != "cuda":
            self._expected.append(weakref.ref(owner, lambda reference: self._see_freed(reference, num_bytes)))

    def _see_freed(self, reference: weakref.ref[object], num_bytes: int) -> None:
        self._expected.remove(reference)
        if torch._C._autograd._profiler_enabled():
            with record_function(f"{_FREED}{num_bytes}"):
                pass

    def excess(self, growth: int) -> int:
        """Return the bytes by which the latest action's peak exceeds both what was held before and the most held since.

        `growth` is by how much more that was, as far as the action did it. What the allocator says of the action's end
        differs where it freed what others had left, or read a batch: the larger of both counts.
        """
        key = self._key
        if self._latest is not None:
            peak, end = self._latest
            self._largest[key] = max(self._largest.get(key, 0), peak - max(0, end, growth))
        return self._largest.get(key, 0)

    def _on_gpu(self, handler: Callable[[Action], None], action: Action) -> tuple[int, int]:
        before = torch.cuda.memory_allocated(self._device)
        self._peak.reset()
        handler(action)
        after = torch.cuda.memory_allocated(self._device)
        return torch.cuda.max_memory_allocated(self._device) - before, after - before


def _on_cpu(handler: Callable[[Action], None], action: Action) -> tuple[int, int]:
    """Do an action; return by how much its peak, and its end, exceed its start."""
    # The newer profiler takes several times as long, and logs its own start and end to standard error.
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, False, True, False, False, False, _ExperimentalConfig()))
    try:
        with errors_only():  # the profiler warns of every thousandth block that is older than the watch
            handler(action)
    finally:
        records = _disable_profiler_legacy()
    running = [0, *accumulate(change for thread in records for change in map(_change, thread))]
    return max(running), running[-1]


def _change(record: Any) -> int:
    """Return by how much a record of the profiler changed what is allocated."""
    # `kind` is text, whatever torch's stub says.
    if str(record.kind()) == "memory_alloc":
        return int(record.cpu_memory_usage())
    return -int(record.name().removeprefix(_FREED)) if record.name().startswith(_FREED) else 0
