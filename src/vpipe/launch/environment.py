"""The environment variables by which the launcher speaks to its ranks, besides torchrun's."""

from __future__ import annotations

__all__ = ["LAUNCHER_PID", "RUN_DIRECTORY"]

LAUNCHER_PID = "VPIPE_LAUNCHER_PID"
"""The process that started this rank and without which it must not go on."""

RUN_DIRECTORY = "VPIPE_RUN_DIRECTORY"
"""The directory that the launcher made for this run."""
