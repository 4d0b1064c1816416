"""Where a rank's log lines go."""

from __future__ import annotations

import logging
import os
from logging.handlers import MemoryHandler
from pathlib import Path

from vpipe.launch.environment import RUN_DIRECTORY

__all__ = ["add_log_file", "configure_logging", "log_path"]


def log_path(run_directory: Path, rank: int | str) -> Path:
    """Return the file with everything that `rank` wrote."""
    return run_directory / f"output.log.{rank}"


def configure_logging() -> None:
    """Send VPipe's log lines to stderr, each with the time and the rank, and keep the first ones for `add_log_file`."""
    handler = logging.StreamHandler()
    handler.setFormatter(_formatter())
    package = logging.getLogger("vpipe")
    package.addHandler(handler)
    if RUN_DIRECTORY not in os.environ:
        # Keeps the lines from before the run's directory is known.
        package.addHandler(MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1))
    package.setLevel(logging.INFO)
    package.propagate = False


def add_log_file(path: Path) -> None:
    """Copy VPipe's log lines to `path` as well, the earlier ones too, for ranks whose output nobody redirected."""
    handler = logging.FileHandler(path)
    handler.setFormatter(_formatter())
    package = logging.getLogger("vpipe")
    package.addHandler(handler)
    for early in [item for item in package.handlers if isinstance(item, MemoryHandler)]:
        early.setTarget(handler)
        early.close()  # which writes what it kept
        package.removeHandler(early)


def _formatter() -> logging.Formatter:
    rank = os.environ.get("RANK", "0")
    return logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
