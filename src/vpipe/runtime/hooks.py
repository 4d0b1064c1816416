"""What a caller may watch while a pipeline runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from vpipe.schedule.action import Action

__all__ = ["Hooks", "Record"]


class Record(Protocol):
    """Takes what was done and when."""

    def __call__(self, action: Action, start_ns: int, end_ns: int) -> None:
        """Note that `action` was done between these two readings of `time.perf_counter_ns`."""


def _ignore_action(action: Action, start_ns: int, end_ns: int) -> None:
    """Record nothing."""


@dataclass(frozen=True)
class Hooks:
    """Functions that are called on every rank for what that rank does; they change nothing of what is computed."""

    record: Record = _ignore_action
    """Called after each action."""
    announce: Callable[[str], None] = field(default=lambda text: None)
    """Called with what the rank is about to wait for, and with `running` afterwards."""
    waited: Callable[[int], None] = field(default=lambda duration_ns: None)
    """Called with the nanoseconds that an update waited for other ranks, before the update is recorded."""
    gradients: Callable[[int, int, Mapping[str, Tensor]], None] | None = None
    """Called before each update with stage, microbatch and the gradients by name, summed and clipped."""
