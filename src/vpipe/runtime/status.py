"""What a rank is doing right now, in a small memory-mapped file that outlives the rank.

A rank that hangs or is killed by SIGKILL cannot say what it was waiting for. So it says so beforehand: a line in a
mapped file costs about a microsecond, and the kernel keeps it whatever happens to the process.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

__all__ = ["STARTING", "STATUS_BYTES", "Status", "StatusFile", "read_status", "status_path"]

STARTING = "starting"
"""What a new file says."""

STATUS_BYTES = 256
_RECORD = struct.Struct(f"<dI{STATUS_BYTES - 12}s")  # when it was written, by which process, the text


@dataclass(frozen=True)
class Status:
    """The last line a rank wrote: `text`, the process `pid`, and the time `written_at` in seconds since the epoch."""

    text: str
    pid: int
    written_at: float


class StatusFile:
    """Write what this process is doing; leaving the `with` block without an exception removes the file.

    Raises:
        OSError: the file cannot be created or mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pid = os.getpid()
        with path.open("a+b") as file:
            os.posix_fallocate(file.fileno(), 0, STATUS_BYTES)  # on a full disk an error, not a SIGBUS later on
            self._map = mmap.mmap(file.fileno(), STATUS_BYTES)
        self.write(STARTING)

    def write(self, text: str) -> None:
        """Replace the line; text beyond the file's fixed size is cut off."""
        self.text = text
        # Not packed into the map: that empties it first, and a reader in between would see no process.
        self._map[:] = _RECORD.pack(time.time(), self._pid, text.encode())

    def remove(self) -> None:
        """Delete the file: the rank ended as it should, there is nothing to explain."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> StatusFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.remove()


def status_path(run_directory: Path, rank: int) -> Path:
    """Return where `rank` keeps its status."""
    return run_directory / f"status.{rank}"


def read_status(run_directory: Path, rank: int) -> Status | None:
    """Read the last line of `rank`; None when it never wrote one or ended as it should."""
    try:
        data = status_path(run_directory, rank).read_bytes()
    except FileNotFoundError:
        return None
    if len(data) != STATUS_BYTES:
        return None
    written_at, pid, text = _RECORD.unpack(data)
    if not pid:
        return None  # just made
    return Status(text.rstrip(b"\0").decode(errors="ignore"), pid, written_at)
