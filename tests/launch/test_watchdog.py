"""When the watchdog ends ranks, by a clock and processes that are only said to run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from vpipe.launch import watchdog as module
from vpipe.launch.watchdog import Watchdog
from vpipe.runtime.status import STATUS_BYTES, StatusFile, status_path

Look = Callable[[float, set[int]], list[int]]


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    """Return a function that looks at a time at three ranks, of which some are gone, and returns whom it killed."""
    killed: list[int] = []
    pids = {rank: 1000 + rank for rank in range(3)}
    for rank, pid in pids.items():
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        StatusFile(status_path(tmp_path, rank))
    monkeypatch.undo()
    watchdog = Watchdog(tmp_path, len(pids), grace_seconds=5)

    def kill(pid: int, number: int) -> None:
        assert number == signal.SIGKILL
        killed.append(pid - 1000)
        if pid == pids[2]:
            raise ProcessLookupError  # it has ended in this moment

    def once(now: float, gone: set[int]) -> list[int]:
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
        monkeypatch.setattr(module, "_is_running_child", lambda pid: pid - 1000 not in gone)
        monkeypatch.setattr(module.os, "kill", kill)
        killed.clear()
        watchdog.check()
        monkeypatch.undo()
        assert watchdog.killed >= set(killed)
        return list(killed)

    return once


def test_the_others_get_their_grace_and_no_more(look: Look) -> None:
    assert look(10.0, set()) == []
    assert look(11.0, {0}) == []
    assert look(15.9, {0}) == []
    assert look(16.1, {0}) == [1, 2]


def test_ranks_that_seemed_to_be_gone_for_a_moment_cost_nobody_the_life(look: Look) -> None:
    assert look(10.0, {1}) == []
    assert look(10.2, set()) == []
    assert look(100.0, {2}) == []
    assert look(105.1, {2}) == [0, 1]


def test_a_rank_that_has_written_nothing_yet_is_not_gone(look: Look, tmp_path: Path) -> None:
    status_path(tmp_path, 1).write_bytes(bytes(STATUS_BYTES))
    assert look(10.0, set()) == look(100.0, set()) == []
    assert look(101.0, {0}) == []
    assert look(107.0, {0}) == [2]
