"""Ends ranks that stay when they should go.

torchrun sends SIGTERM to all ranks as soon as one fails and SIGKILL half a minute later. A rank that is suspended, or
whose user code catches SIGTERM while it waits inside C++, would hold up everybody for that long.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from vpipe.runtime.status import read_status

__all__ = ["Watchdog"]


class Watchdog:
    """Watch the ranks that this process started, by the status files they write; call `check` now and then.

    Once a rank is gone without removing its status file, which is how a clean end looks, the others get
    `grace_seconds` before SIGKILL. `killed` holds the ranks that needed it.
    """

    def __init__(self, run_directory: Path, num_ranks: int, grace_seconds: float) -> None:
        self._run_directory = run_directory
        self._num_ranks = num_ranks
        self._grace_seconds = grace_seconds
        self._failed_at: float | None = None
        self.killed: set[int] = set()

    def check(self) -> None:
        """Look at all ranks once."""
        statuses = {rank: read_status(self._run_directory, rank) for rank in range(self._num_ranks)}
        pids = {rank: status.pid for rank, status in statuses.items() if status is not None}
        alive = {rank: pid for rank, pid in pids.items() if _is_running_child(pid)}
        if len(alive) == len(pids):
            self._failed_at = None
            return
        if self._failed_at is None:
            self._failed_at = time.monotonic()
        if time.monotonic() - self._failed_at > self._grace_seconds:
            for rank, pid in alive.items():
                self.killed.add(rank)
                with suppress(ProcessLookupError):  # it ended, and torchrun has noticed
                    os.kill(pid, signal.SIGKILL)


def _is_running_child(pid: int) -> bool:
    """Whether `pid` is a process of ours that has not ended; so a number that was given away again is left alone."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX" and int(parent) == os.getpid()
