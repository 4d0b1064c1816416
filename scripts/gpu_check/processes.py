"""All processes that a check has started, however far down, found by a variable that they inherit."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["TOKEN", "end_all", "ranks_of", "sweep"]

TOKEN = "GPU_CHECK_TOKEN"
"""The variable, with a value of its own for each check. Ranks lead sessions of their own, and outlive a launcher that
crashed: neither groups nor parents find them all."""

_LAST_WORDS_SECONDS = 2.0
_END_SECONDS = 5.0


def ranks_of(token: str) -> dict[int, int]:
    """Return the process of each rank that runs, by rank."""
    return {int(own["RANK"]): pid for pid, own in _found(token).items() if own.get("RANK", "").isdigit()}


def end_all(token: str) -> None:
    """Ask the processes of a check that took too long to end.

    SIGABRT lets each write where it is (with PYTHONFAULTHANDLER set), the ranks first: they die with their launcher.
    """
    for chosen in (ranks_of(token).values(), _found(token)):
        _send(chosen, signal.SIGABRT)
        _wait(chosen, _LAST_WORDS_SECONDS)


def sweep(token: str, grace_seconds: float) -> tuple[int, list[int]]:
    """End what a check that is over has left; return how many processes, and those that could not be ended."""
    _wait_for_none(token, grace_seconds)
    left = list(_found(token))
    end = time.monotonic() + _END_SECONDS
    while (found := list(_found(token))) and time.monotonic() < end:
        _send(found, signal.SIGKILL)
        _wait(found, 0.2)
    return len(left), found


def _found(token: str) -> dict[int, dict[str, str]]:
    """Return the environments of the processes with this token, but for this one."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            pairs = (item.partition("=") for item in path.read_bytes().decode(errors="replace").split("\0"))
            own = {name: value for name, _, value in pairs}
            if own.get(TOKEN) == token:
                found[int(path.parent.name)] = own
    found.pop(os.getpid(), None)
    return found


def _send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _wait(pids: Iterable[int], seconds: float) -> None:
    """Wait until these have ended; the environment of one that its parent has not waited for is empty."""
    end = time.monotonic() + seconds
    while any(map(_runs, pids)) and time.monotonic() < end:
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/environ").read_bytes())
    except OSError:
        return False


def _wait_for_none(token: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and _found(token):
        time.sleep(0.05)
