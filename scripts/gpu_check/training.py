"""Does it train: the demo's model, synchronous and asynchronous, and a rank that is killed."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_check.child import attempt
from gpu_check.commands import Done, backend_of, last_error, latest_run, started, vpipe
from gpu_check.demo import demo
from gpu_check.notes import CheckFailed, Notes
from gpu_check.processes import TOKEN, ranks_of

__all__ = ["asynchronous", "killed", "killed_nccl", "nccl", "synchronous", "train"]

_SOON_SECONDS = 25
"""By itself torchrun takes 30 s to end the others, and they wait 300 s for each other."""


def synchronous(notes: Notes) -> None:
    """Train the demo's model by 1F1B on two ranks, on one device; nobody says that this takes gloo."""
    cut = {"plan.partition": [26, 23]} if notes.on_gpu else {}
    train(notes, "1f1b", demo(notes, 2) | cut, backend="gloo")


def asynchronous(notes: Notes) -> None:
    """Train by PipeDream on ranks that share a device: cut evenly, more of them, cut unevenly."""
    uneven = [12, 37] if notes.on_gpu else [1, 4]
    placements = {
        "2 ranks": demo(notes, 2),
        "3 ranks": demo(notes, 3),
        "2 uneven": demo(notes, 2) | {"plan.partition": uneven},
    }
    for name, settings in placements.items():
        settings |= {"pipeline.schedule": "pipedream"}
        attempt(notes, partial(train, notes, name, settings, backend="gloo"), name)


def nccl(notes: Notes) -> None:
    """Train on two devices, for which nobody says that this takes NCCL."""
    for schedule in ("1f1b", "pipedream"):
        settings = demo(notes, 2, 0, 1) | {"pipeline.schedule": schedule}
        attempt(notes, partial(train, notes, schedule, settings, backend="nccl"), schedule)


def train(notes: Notes, name: str, settings: dict[str, object], *, backend: str) -> None:
    """Run `vpipe train`; its losses have to be numbers and fall, and its ranks to talk through `backend`.

    Raises:
        CheckFailed: they do not, or the run fails.
    """
    vpipe(notes, "train", settings)
    run = latest_run(notes)
    losses = [record["loss"] for record in _records(run) if "loss" in record]
    summary = json.loads((run / "summary.json").read_text())
    kept = ("iteration_ms", "samples_per_second", "peak_memory_bytes", "peak_ledger_bytes", "weight_versions")
    numbers = {"losses": losses, "backend": backend_of(run), **{key: summary[key] for key in kept}}
    notes.number(**{name: numbers})
    if not losses:
        raise CheckFailed("the run wrote no loss")
    first, last = _ends(losses)
    notes.say(f"{name}: loss {first:.2f} to {last:.2f}, {summary['iteration_ms'] or 0.0:.0f} ms")
    if not all(map(math.isfinite, losses)) or not last < first:
        raise CheckFailed(f"the loss does not fall: from {first:.4f} to {last:.4f} in {len(losses)} iterations")
    if numbers["backend"] != backend:
        raise CheckFailed(f"ranks talk through {numbers['backend']}, not {backend}")


def _records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _ends(losses: list[float]) -> tuple[float, float]:
    """Return the mean of the first and of the last quarter."""
    count = max(1, len(losses) // 4)
    return statistics.fmean(losses[:count]), statistics.fmean(losses[-count:])


def killed(notes: Notes) -> None:
    """Kill a rank in the middle of a run on one device."""
    _kill(notes, demo(notes, 2))


def killed_nccl(notes: Notes) -> None:
    """Kill a rank in the middle of a run on two devices, whose other rank is inside NCCL."""
    _kill(notes, demo(notes, 2, 0, 1))


def _kill(notes: Notes, settings: dict[str, object]) -> None:
    """Train without end and kill rank 1; everybody has to end soon, and to say who died."""
    with started(notes, "train", settings | {"train.iterations": 1_000_000}) as training:
        metrics = notes.folder / "runs" / "latest" / "metrics.jsonl"
        _wait_until(training, lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
        backend, begin = backend_of(metrics.resolve().parent), time.monotonic()
        os.kill(ranks_of(os.environ[TOKEN])[1], signal.SIGKILL)
        code = training.process.wait()
        told = time.monotonic() - begin
        while ranks_of(os.environ[TOKEN]):
            time.sleep(0.02)
        seconds = time.monotonic() - begin
    notes.number(backend=backend, told_s=round(told, 2), all_ended_s=round(seconds, 2), message=training.err)
    notes.say(f"told after {told:.1f} s, through {backend}")
    if code != 1 or "rank 1 was killed by signal 9" not in training.err:
        raise CheckFailed(f"exit code {code}, and not told who died: {last_error(training.err)}")
    if seconds > _SOON_SECONDS:
        raise CheckFailed(f"all ranks had ended after {seconds:.0f} s, not within {_SOON_SECONDS} s")


def _wait_until(training: Done, is_so: Callable[[], bool]) -> None:
    while not is_so():
        if training.process.poll() is not None:
            raise CheckFailed(f"the run ended too early: {last_error(training.err)}")
        time.sleep(0.02)
