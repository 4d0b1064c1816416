"""Runs checks, each in a process of its own with a limit of time, as long as the time of all allows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_check.check import Check, Outcome, Result
from gpu_check.notes import Notes
from gpu_check.processes import TOKEN, end_all, sweep

__all__ = ["Runner"]

_POLL_SECONDS = 0.1
_SWEEP_SECONDS = 2.0
_NUM_LINES = 120
_NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
"""What torchrun gives to a rank: checks start ranks of their own."""


@dataclass(frozen=True)
class _End:
    """How the process of a check ended."""

    by_itself: bool
    code: int | None
    seconds_at: float
    num_left: int
    """Processes that it left, which were ended."""
    stuck: list[int]
    """Those that could not be ended."""


@dataclass
class Runner:
    """Runs checks one after another, or several at once; `stop` ends those that run."""

    device: str
    seconds: float
    """For all checks together, from when the runner is made."""
    num_devices: int = 0
    """CUDA devices that there are, once that is known."""
    tell: Callable[[Outcome], None] = lambda _: None
    """Is given each outcome as soon as it is known, by whichever thread."""
    _start: float = field(default_factory=time.monotonic)
    _stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def seconds_left(self) -> float:
        """How long checks may still take."""
        return self.seconds - (time.monotonic() - self._start)

    def stop(self) -> None:
        """End the checks that run, and begin no other."""
        self._stopping.set()

    def run_all(self, checks: Sequence[Check], num_jobs: int) -> list[Outcome]:
        """Return the outcomes in the order of `checks`; those that measure times run last, and alone."""
        outcomes: dict[str, Outcome] = {}
        together = [check for check in checks if not check.alone]
        with ThreadPoolExecutor(num_jobs) as pool:
            futures = {check.name: pool.submit(self.run, check) for check in together}
            try:
                outcomes |= {name: future.result() for name, future in futures.items()}
            except BaseException:
                self.stop()  # or the pool would wait for them
                raise
        outcomes |= {check.name: self.run(check) for check in checks if check.alone}
        return [outcomes[check.name] for check in checks]

    def run(self, check: Check) -> Outcome:
        """Run one check if it can run and the time is enough, and return what came out."""
        if reason := self._why_not(check):
            outcome = Outcome(check.name, check.shows, "not run", reason, repeat=self._repeat(check))
        else:
            with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as folder:
                outcome = self._run_in(check, Path(folder))
        self.tell(outcome)
        return outcome

    def _why_not(self, check: Check) -> str:
        if self.device == "cpu" and check.not_on_cpu:
            return check.not_on_cpu
        if self.device == "cuda" and check.num_devices > self.num_devices:
            return f"needs {check.needs}, and there is {self.num_devices or 'none'}"
        if self._stopping.is_set():
            return "interrupted"
        return "no time left" if self.seconds_left < check.seconds else ""

    def _repeat(self, check: Check) -> str:
        interpreter = f"PYTHON={sys.executable} " if os.environ.get("PYTHON") else ""
        return f"{interpreter}scripts/gpu-check --only {check.name}" + (" --device cpu" * (self.device == "cpu"))

    def _run_in(self, check: Check, folder: Path) -> Outcome:
        limit, start = min(check.limit_seconds(self.device), self.seconds_left), time.monotonic()
        end = self._execute(check, folder, limit)
        notes = _read(folder)
        if not end.by_itself:
            late = f"did not end within {limit:.3g} s and was ended"
            notes["problems"].insert(0, "interrupted" if self._stopping.is_set() else late)
        elif not notes["finished"]:
            notes["problems"].insert(0, _how_it_ended(end.code))
        if end.stuck:
            notes["problems"].append(f"processes {end.stuck} could not be ended")
        if end.num_left:
            notes["numbers"]["processes_left"] = end.num_left
        result: Result = "failed" if notes["problems"] else "passed" if check.judged else "reported"
        return Outcome(
            check.name,
            check.shows,
            result,
            notes["problems"][0] if notes["problems"] else notes["found"],
            round(end.seconds_at - start, 1),
            round(limit, 1),
            notes["numbers"],
            notes["problems"],
            notes["commands"],
            self._repeat(check),
            notes["traceback"],
            dict(_last_lines(folder)) if result == "failed" else {},
        )

    def _execute(self, check: Check, folder: Path, limit: float) -> _End:
        """Run the process of a check, and see to it that nothing that it started is left."""
        token = uuid.uuid4().hex
        command = [sys.executable, "-m", "gpu_check.child", check.target, self.device, str(self.num_devices)]
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            child = subprocess.Popen(
                [*command, str(folder)], env=_environment(token), stdin=subprocess.DEVNULL, stdout=out, stderr=err
            )
        try:
            by_itself = self._wait(child, limit)
            now = time.monotonic()
            if not by_itself:
                end_all(token)
            num_left, stuck = sweep(token, _SWEEP_SECONDS if by_itself else 0.0)
        except BaseException:
            sweep(token, 0.0)
            raise
        with suppress(subprocess.TimeoutExpired):
            child.wait(_SWEEP_SECONDS)
        return _End(by_itself, child.returncode, now, num_left if by_itself else 0, stuck)

    def _wait(self, child: subprocess.Popen[bytes], limit: float) -> bool:
        """Wait for the process of a check; tell whether it ended by itself."""
        end = time.monotonic() + limit
        while time.monotonic() < end and not self._stopping.is_set():
            with suppress(subprocess.TimeoutExpired):
                child.wait(_POLL_SECONDS)
                return True
        return child.poll() is not None


def _environment(token: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    # A process that hangs or crashes writes where it is.
    return inherited | {TOKEN: token, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}


def _read(folder: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(Notes.path(folder).read_text())
    except (OSError, ValueError):
        content = {}
    empty = {"finished": False, "found": "", "numbers": {}, "problems": [], "commands": [], "traceback": ""}
    return empty | content


def _how_it_ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"ended with exit code {code} before it was done"
    known = -code in {int(number) for number in signal.Signals}
    return f"was ended by signal {-code}" + (f" ({signal.Signals(-code).name})" if known else "")


def _last_lines(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the last lines of all that processes wrote, by the file's place in `folder`."""
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(("stdout", "stderr", "launcher.log")) or path.name.startswith("output.log."):
            lines = path.read_text(errors="replace").splitlines()
            if lines:
                yield str(path.relative_to(folder)), lines[-_NUM_LINES:]
