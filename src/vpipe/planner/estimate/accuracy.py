"""How far estimates were from published runs: the summary of benchmarks/estimate, which a test compares with it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COMPARED", "Compared"]


@dataclass(frozen=True)
class Compared:
    """Errors of the time of a step, estimated over published, less 1, of runs that nothing was fitted to."""

    num_runs: int
    mean: float
    """Of the absolute errors."""
    lowest: float
    highest: float
    devices: tuple[str, ...]
    """Those that the runs were on."""


COMPARED = Compared(21, 0.086, -0.248, 0.131, ("a100-80gb", "h100-80gb", "v100-16gb", "v100-32gb"))
