"""What a check is, and what came out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Check", "Outcome", "Result"]

Result = Literal["passed", "failed", "reported", "not run"]

_LEAST_LIMIT_SECONDS = 30.0
_PATIENCE, _CPU_PATIENCE = 3.0, 10.0


@dataclass(frozen=True)
class Check:
    """One thing to find out, by a function that gets `Notes` and runs in a process of its own."""

    name: str
    shows: str
    target: str
    """The function, as ``package.module:function``."""
    seconds: float
    """What it takes on one H200, with room: its share of the time."""
    num_devices: int = 1
    """CUDA devices without which it cannot run."""
    not_on_cpu: str = ""
    """Why it cannot run on a CPU; empty where it can."""
    alone: bool = False
    """Whether it measures times, and nothing else may run meanwhile."""
    judged: bool = True
    """Whether it can fail by what it measures; otherwise it only reports."""
    limit: float | None = None
    """How many seconds it may take at most, where that is not several times `seconds`."""

    def limit_seconds(self, device: str) -> float:
        """Return how long it may take at most; on a CPU, where it is run to find mistakes in itself, it has time."""
        if self.limit is not None:
            return self.limit
        patience = _CPU_PATIENCE if device == "cpu" else 1.0
        return patience * max(_LEAST_LIMIT_SECONDS, _PATIENCE * self.seconds)

    @property
    def needs(self) -> str:
        """Say what the machine must have."""
        return ("", "a CUDA device", "2 CUDA devices")[self.num_devices]


@dataclass(frozen=True)
class Outcome:
    """What came out of a check."""

    name: str
    shows: str
    result: Result
    found: str
    """One line: why it failed or did not run, or else what it found."""
    seconds: float = 0.0
    limit_seconds: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """All that is wrong, of which `found` has the first."""
    commands: list[str] = field(default_factory=list)
    """What was run underneath."""
    repeat: str = ""
    """How to run this check alone."""
    traceback: str = ""
    logs: dict[str, list[str]] = field(default_factory=dict)
    """Of a check that failed, the last lines of each file that its processes wrote."""
