"""The command lines that checks run, as a user would."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_check.notes import CheckFailed, Notes

__all__ = ["CONFIG", "Done", "backend_of", "last_error", "latest_run", "ranks", "started", "vpipe"]

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yml"
"""The demo's run."""

_BACKEND = "process group; backend: "


class Done:
    """A command that runs or ran. What it writes is in files of the check's folder, and outlives a time limit."""

    def __init__(self, notes: Notes, command: Sequence[str]) -> None:
        number = len(list(notes.folder.glob("*.stderr"))) + 1
        self._out, self._err = (notes.folder / f"command-{number}.{name}" for name in ("stdout", "stderr"))
        # Else gloo asks what the name of this machine resolves to, which is not what is checked.
        variables = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(command, env=variables, stdout=out, stderr=err)

    @property
    def out(self) -> str:
        """What it wrote to standard output so far."""
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        """What it wrote to standard error so far."""
        return self._err.read_text(errors="replace")


def vpipe(
    notes: Notes,
    command: str,
    settings: Mapping[str, object],
    *more: str,
    config: Path = CONFIG,
    codes: Sequence[int] = (0,),
) -> Done:
    """Run `vpipe train` or `verify` to its end, with `settings` instead of what the YAML file says.

    Raises:
        CheckFailed: another exit code than `codes`; with the command's own error message.
    """
    done = _start_vpipe(notes, command, config, settings, *more)
    if (code := done.process.wait()) not in codes:
        raise CheckFailed(f"vpipe {command} ended with exit code {code}: {last_error(done.err)}")
    return done


@contextmanager
def started(notes: Notes, command: str, settings: Mapping[str, object]) -> Iterator[Done]:
    """Start `vpipe train` on the demo's YAML, and let it go on no longer than this lasts."""
    done = _start_vpipe(notes, command, CONFIG, settings)
    try:
        yield done
    finally:
        done.process.terminate()
        done.process.wait()


def _start_vpipe(notes: Notes, command: str, config: Path, settings: Mapping[str, object], *more: str) -> Done:
    given = {"log_directory": notes.folder / "runs", **settings}
    overrides = [text for key, value in given.items() for text in ("--set", f"{key}={_as_yaml(value)}")]
    words = [command, str(config), *overrides, *more]
    notes.command(shlex.join(["vpipe", *words]))
    return Done(notes, [sys.executable, "-m", "vpipe", *words])


def _as_yaml(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)


def ranks(notes: Notes, module: str, num_ranks: int, *arguments: str) -> tuple[list[dict[str, Any]], str]:
    """Run ``python -m module`` as ranks under torchrun, a single one without it.

    Return the JSON objects that it printed, and what was wrong in the end, if anything was.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    start = [*torchrun, "--nproc-per-node", str(num_ranks)] if num_ranks > 1 else []
    words = [*start, "-m", module, *arguments]
    notes.command(shlex.join(["PYTHONPATH=scripts:src", "python", *words]))
    done = Done(notes, [sys.executable, *words])
    code = done.process.wait()
    error = f"{module} ended with exit code {code}: {last_error(done.err)}" if code else ""
    return [json.loads(line) for line in done.out.splitlines() if line.startswith("{")], error


def latest_run(notes: Notes) -> Path:
    """Return the folder of the run that began last."""
    return max((path for path in (notes.folder / "runs").iterdir() if not path.is_symlink()), key=_age)


def _age(path: Path) -> int:
    return path.stat().st_ctime_ns


def backend_of(run: Path) -> str:
    """Return what the ranks of a run talked through, as the log of its rank 0 says."""
    for path in (run / "output.log.0", run / "pipeline" / "output.log.0"):
        if path.exists() and _BACKEND in (text := path.read_text(errors="replace")):
            return text.partition(_BACKEND)[2].partition(",")[0]
    return "unknown"


def last_error(text: str) -> str:
    """Return the line of a standard error that says what was wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("error: ") or " ERROR: " in line]
    python = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    return (ours or python or lines[-1:] or ["nothing was written"])[0].removeprefix("error: ")
