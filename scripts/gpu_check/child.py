"""The process of one check: ``python -m gpu_check.child TARGET DEVICE NUM_DEVICES FOLDER``."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from gpu_check.notes import CheckFailed, Notes

__all__ = ["attempt"]


def attempt(notes: Notes, function: Callable[[], None], what: str = "") -> None:
    """Call a part of a check; what goes wrong there is a problem, and the next part can be tried."""
    start = f"{what}: " if what else ""
    try:
        function()
    except CheckFailed as failure:
        notes.problem(f"{start}{failure}")
    except Exception as error:
        notes.trace(traceback.format_exc())
        first, *_ = str(error).splitlines() or [""]
        notes.problem(f"{start}{type(error).__name__}: {first}")


def main() -> None:
    """Run the check that the command line names."""
    target, device, num_devices, folder = sys.argv[1:]
    notes = Notes(Path(folder), device, int(num_devices))

    def run() -> None:
        module, _, name = target.partition(":")
        getattr(importlib.import_module(module), name)(notes)

    attempt(notes, run)
    notes.finish()


if __name__ == "__main__":
    main()
