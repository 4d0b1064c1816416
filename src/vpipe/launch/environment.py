"""The environment variables that ranks read, besides torchrun's."""

from __future__ import annotations

__all__ = ["LAST_WORDS_SECONDS", "LAUNCHER_PID", "RUN_DIRECTORY"]

LAST_WORDS_SECONDS = "VPIPE_LAST_WORDS_SECONDS"
"""How long a rank that torchrun tells to end may look for the reason, 5 by default; torchrun itself waits for 30."""

LAUNCHER_PID = "VPIPE_LAUNCHER_PID"
"""The process that started this rank and without which it must not go on."""

RUN_DIRECTORY = "VPIPE_RUN_DIRECTORY"
"""The directory that the launcher made for this run."""
