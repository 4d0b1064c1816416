"""Check VPipe on the CUDA devices of this machine, in at most 4 minutes.

Trains the demo's model, synchronous and asynchronous, with ranks that share a device; verifies the answer against
one process; compares the memory ledger with torch's allocator; looks whether swapping uses pinned memory and a
stream of its own; kills a rank; measures throughput against torch's 1F1B; where there are two devices also by NCCL.
Nothing is downloaded. Prints one table and writes one JSON file, which also has every command and, of what failed, the
tracebacks and logs.

Estimated at 2 minutes on one H200 with 16 cores and 4 with few cores; never more than --seconds. Without a CUDA device
it says what it would do. Exit code 0: all checks that could run passed; 1: one failed; 2: wrong arguments.

scripts/setup makes .venv if there is none. PYTHON=/path/to/python scripts/gpu-check takes another interpreter
instead, such as one that has torch with CUDA already. It needs the other packages of pyproject.toml too; VPipe need
not be installed in it.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_check.catalogue import CHECKS, MACHINE
from gpu_check.check import Check, Outcome
from gpu_check.report import outcome_table, plan_table, say, write_report
from gpu_check.runner import Runner
from vpipe.words.near import did_you_mean, plural

__all__ = ["main"]

_USAGE, _INTERRUPTED = 2, 130
_MOST_JOBS, _CORES_PER_JOB = 3, 4


def main(arguments: Sequence[str] | None = None, checks: Sequence[Check] = CHECKS, machine: Check = MACHINE) -> int:
    """Run `checks` as the command line says, after `machine`, and return the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    chosen = _choose(parser, given.only, checks, machine)
    if given.list:
        _print_plan(chosen)
        return 0
    words = sys.argv[1:] if arguments is None else arguments
    return _Session(given, shlex.join(["scripts/gpu-check", *words]), chosen, machine).run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "scripts/gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), metavar="FILE", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=240.0, help="for all checks; default: %(default)g")
    parser.add_argument("--only", metavar="NAME,...", help="run these checks alone")
    parser.add_argument("--list", action="store_true", help="list the checks, and run none")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help=f"checks at once, but for those that measure times; default: one for "
        f"{_CORES_PER_JOB} cores, at most {_MOST_JOBS}",
    )  # fmt: skip
    # Not for users: it shows that the checks themselves work, on a machine that has no GPU.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    return parser


def _choose(parser: argparse.ArgumentParser, only: str | None, checks: Sequence[Check], machine: Check) -> list[Check]:
    """Return the checks that `only` names, without `machine`, which runs anyway."""
    if only is None:
        return list(checks)
    known = {check.name: check for check in (machine, *checks)}
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in known:
            parser.error(f"--only has '{name}', which is no check{did_you_mean(name, known)}; --list has them all")
    return [known[name] for name in dict.fromkeys(names) if name != machine.name]


def _print_plan(checks: Sequence[Check]) -> None:
    for line in plan_table(checks):
        say(line)
    one, two = (sum(check.seconds for check in checks if check.num_devices <= number) for number in (1, 2))
    say(f"about {one:.0f} s one after another on one device, {two:.0f} s on two; several run at once where cores allow")


class _Session:
    """One call: what it was asked for, and what came out so far."""

    def __init__(self, given: argparse.Namespace, command: str, checks: Sequence[Check], machine: Check) -> None:
        self._given, self._command, self._checks, self._machine = given, command, checks, machine
        self._outcomes: dict[str, Outcome] = {}
        self._writes = False
        """Not before there is something to run: an older file may be worth more than that there is no device."""
        self._runner = Runner(given.device, given.seconds, tell=self._take)
        self._start = time.monotonic()
        self._began = datetime.now(UTC)
        self._lock = threading.Lock()

    def run(self) -> int:
        """Run all checks and tell what came out; return the exit code."""
        try:
            return self._run()
        except KeyboardInterrupt:
            self._finish()
            return _INTERRUPTED

    def _run(self) -> int:
        machine = self._runner.run(self._machine)
        devices = machine.numbers.get("devices", [])
        if self._given.device == "cuda" and not devices:
            return self._without_devices(machine)
        self._runner.num_devices = len(devices)
        jobs = self._given.jobs or (_num_jobs() if self._given.device == "cuda" else 1)
        self._writes = True
        try:
            self._write()
        except OSError as error:
            say(f"--out {self._given.out} cannot be written: {error.strerror}")
            return _USAGE
        self._runner.run_all(self._checks, jobs)
        return self._finish()

    def _without_devices(self, machine: Outcome) -> int:
        """Say what there would be to do; that is a failure only where a GPU is there and torch cannot use it."""
        if machine.result != "passed":
            self._writes = True
            return self._finish()
        torch, listed = machine.numbers.get("torch"), machine.numbers.get("nvidia_smi", [])
        built = "" if machine.numbers.get("torch_cuda") else ", which was built without CUDA"
        if listed:
            say(f"nvidia-smi lists {plural(len(listed), 'GPU', 'GPUs')}, and torch {torch}{built}, finds none.")
            say("Nothing was run. PYTHON=/path/to/python scripts/gpu-check takes an interpreter whose torch has CUDA.")
            return 1
        say(f"There is no CUDA device (torch {torch}{built}), so nothing was run. With one, this would be:")
        say()
        _print_plan([self._machine, *self._checks])
        return 0

    def _take(self, outcome: Outcome) -> None:
        """Show that a check is over, and write the file anew: whatever ends this process, it has what is known."""
        now = time.monotonic() - self._start
        with self._lock:
            self._outcomes[outcome.name] = outcome
            sys.stderr.write(f"[{now:5.0f} s] {outcome.name}: {outcome.result}\n")
            self._write()

    def _in_order(self) -> list[Outcome]:
        names = [check.name for check in (self._machine, *self._checks)]
        return [self._outcomes[name] for name in names if name in self._outcomes]

    def _write(self) -> None:
        if not self._writes:
            return
        machine = self._outcomes.get(self._machine.name)
        about: dict[str, Any] = {
            "began": self._began.isoformat(timespec="seconds"),
            "command": self._command,
            "device": self._given.device,
            "seconds_allowed": self._given.seconds,
            "seconds": round(time.monotonic() - self._start, 1),
            "environment": machine.numbers if machine else {},
        }
        write_report(self._given.out, about, self._in_order())

    def _finish(self) -> int:
        self._write()
        outcomes = self._in_order()
        for line in outcome_table(outcomes):
            say(line)
        counts = Counter(outcome.result for outcome in outcomes)
        told = ", ".join(f"{count} {result}" for result, count in counts.most_common())
        say()
        say(f"{told}, in {time.monotonic() - self._start:.0f} s; everything is in {self._given.out}")
        return 1 if counts["failed"] else 0


def _num_jobs() -> int:
    return max(1, min(_MOST_JOBS, len(os.sched_getaffinity(0)) // _CORES_PER_JOB))


if __name__ == "__main__":
    # A process of a GPU leaves a core as large as all that it has mapped.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
