"""`scripts/gpu-check`: what it says without a GPU, and that nothing a check does stops the others.

Its checks themselves need a GPU; `scripts/gpu-check --device cpu` tries those that can be tried without one.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "gpu-check"

sys.path.insert(0, str(ROOT / "scripts"))
catalogue, check_module, commands, driver, measured, processes, runner_module, swap_rank = (
    importlib.import_module(f"gpu_check.{name}")
    for name in ("catalogue", "check", "commands", "__main__", "measured", "processes", "runner", "swap_rank")
)
Check = check_module.Check

# Stands in for the checks and for the machine: none of it needs torch.
FAKES = """
import os, signal, subprocess, sys, threading
from pathlib import Path

from gpu_check.notes import CheckFailed


def machine(notes):
    notes.number(devices=[{"index": 0, "name": "a device"}], torch="9.9")


def passing(notes):
    notes.number(answer=42)
    notes.command("vpipe train run.yml")
    notes.say("all is well")


def failing(notes):
    notes.number(before=1)
    notes.problem("one thing is wrong")
    raise CheckFailed("another, too")


def stumbling(notes):
    {}["missing"]


def crashing(notes):
    notes.number(before=2)
    sys.stderr.write("the last words\\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)


def leaving(notes):
    sys.exit(7)


def hanging(notes):
    notes.number(before=3)
    code = "import signal; signal.pause()"
    rank = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "RANK": "0"}, start_new_session=True)
    ready = Path(os.environ["FAKES_READY"])
    ready.with_suffix(".new").write_text(str(rank.pid))
    ready.with_suffix(".new").replace(ready)
    threading.Event().wait()
"""


def fake(name: str, **given: Any) -> Any:
    return Check(name, f"shows {name}", f"fakes:{name}", 0.0, **given)


MACHINE = fake("machine", num_devices=0)


@pytest.fixture(autouse=True)
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the fakes known to the processes of checks; return what one that hangs writes when it does."""
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT / "scripts", ROOT / "src", tmp_path))))
    monkeypatch.setenv("FAKES_READY", str(tmp_path / "ready"))
    # On a machine that is busy a process may take long to say where it is.
    monkeypatch.setattr(processes, "_LAST_WORDS_SECONDS", 60.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "ready"


def run(*arguments: str, checks: tuple[Any, ...]) -> tuple[int, dict[str, Any]]:
    """Run the fakes as `scripts/gpu-check` runs its checks; return the exit code and the file that it wrote."""
    code = driver.main([*arguments, "--out", "found/out.json"], checks=checks, machine=MACHINE)
    report = json.loads(Path("found/out.json").read_text())
    report["checks"] = {outcome["name"]: outcome for outcome in report["checks"]}
    return code, report


def test_it_is_strict_executable_bash() -> None:
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
    assert SCRIPT.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in SCRIPT.read_text()
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_without_a_gpu_it_says_what_it_would_do() -> None:
    import torch

    if torch.cuda.is_available() or shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU")
    environment = {**os.environ, "PYTHON": sys.executable}
    del environment["PYTHONPATH"]
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"There is no CUDA device (torch {torch.__version__}")
    for check in catalogue.CHECKS:
        assert check.shows in done.stdout
    assert not Path("gpu-check.json").exists()


def test_the_script_takes_the_interpreter_that_it_is_given(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$PYTHONPATH|$*"\n')
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    done = subprocess.run([SCRIPT, "--list"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{ROOT}/scripts:{ROOT}/src|-m gpu_check --list\n"


def test_list_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert driver.main(["--list", "--only", "swap,memory"]) == 0
    header, *rows, total = capsys.readouterr().out.splitlines()
    assert header.split() == ["check", "needs", "seconds", "what", "it", "shows"]
    assert [row.split()[0] for row in rows] == ["swap", "memory"]
    assert total.startswith("about 40 s one after another on one device")
    with pytest.raises(SystemExit) as caught:
        driver.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "at most 4 minutes" in text
    assert "PYTHON=/path/to/python" in text
    assert "--device" not in text


def test_an_unknown_check(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        driver.main(["--only", "swop"])
    assert caught.value.code == 2
    assert "--only has 'swop', which is no check; did you mean 'swap'?" in capsys.readouterr().err


def test_the_catalogue() -> None:
    names = [check.name for check in catalogue.CHECKS]
    assert len(set(names)) == len(names)
    for check in (catalogue.MACHINE, *catalogue.CHECKS):
        module, _, function = check.target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
    # On one device all has its share of the time, even one after another.
    one = [catalogue.MACHINE, *(check for check in catalogue.CHECKS if check.num_devices == 1)]
    assert sum(check.seconds for check in one) <= 240


def test_whatever_a_check_does_the_others_run_and_all_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    checks = (
        fake("failing"), fake("stumbling"), fake("crashing"), fake("leaving"), fake("hanging", limit=0.01),
        fake("passing"), Check("told", "tells", "fakes:passing", 0.0, judged=False),
        fake("absent"), fake("machine2", num_devices=2),
    )  # fmt: skip
    code, report = run("--jobs", "3", checks=checks)
    table = capsys.readouterr().out
    outcomes = report["checks"]
    assert code == 1
    assert report["passed"] is False
    assert report["environment"]["torch"] == "9.9"
    assert report["command"] == "scripts/gpu-check --jobs 3 --out found/out.json"
    assert list(outcomes) == ["machine", *(check.name for check in checks)]
    expected = {
        "failing": ("failed", "one thing is wrong"),
        "stumbling": ("failed", "KeyError: 'missing'"),
        "crashing": ("failed", "was ended by signal 11 (SIGSEGV)"),
        "leaving": ("failed", "ended with exit code 7 before it was done"),
        "hanging": ("failed", "did not end within 0.01 s and was ended"),
        "passing": ("passed", "all is well"),
        "told": ("reported", "all is well"),
        "machine2": ("not run", "needs 2 CUDA devices, and there is 1"),
    }
    for name, (result, found) in expected.items():
        assert (outcomes[name]["result"], outcomes[name]["found"]) == (result, found)
        (row,) = [line for line in table.splitlines() if line.split()[0:1] == [name]]
        assert found in row
        assert ("FAILED" in row) == (result == "failed")
    assert outcomes["failing"]["problems"] == ["one thing is wrong", "another, too"]
    assert outcomes["failing"]["numbers"] == {"before": 1}
    assert outcomes["crashing"]["numbers"] == {"before": 2}
    assert outcomes["crashing"]["logs"]["stderr"][0] == "the last words"
    assert "in stumbling" in outcomes["stumbling"]["traceback"]
    assert "AttributeError" in outcomes["absent"]["found"]
    assert outcomes["passing"]["commands"] == ["vpipe train run.yml"]
    assert outcomes["passing"]["numbers"] == {"answer": 42}
    assert outcomes["passing"]["repeat"].endswith("scripts/gpu-check --only passing")
    assert outcomes["passing"]["logs"] == {}


def test_a_file_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert driver.main(["--out", "file/out.json"], checks=(fake("passing"),), machine=MACHINE) == 2
    assert capsys.readouterr().out.startswith("--out file/out.json cannot be written: ")


def test_the_machine_alone() -> None:
    code, report = run("--only", "machine", checks=(fake("failing"),))
    assert (code, list(report["checks"])) == (0, ["machine"])


def test_when_all_that_ran_passed(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = run(checks=(fake("passing"), fake("two", num_devices=2)))
    assert code == 0
    assert report["passed"] is True
    assert "2 passed, 1 not run, in " in capsys.readouterr().out


def test_one_that_hangs_says_where_and_leaves_nothing(fakes: Path) -> None:
    runner = runner_module.Runner("cuda", 600.0, num_devices=1)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(runner.run(fake("hanging", limit=600.0))))
    thread.start()
    while not fakes.exists():
        assert thread.is_alive()
        time.sleep(0.01)
    runner.stop()
    thread.join()
    (outcome,) = found
    assert (outcome.result, outcome.found) == ("failed", "interrupted")
    assert outcome.numbers == {"before": 3}
    assert any("fakes.py" in line and "in hanging" in line for line in outcome.logs["stderr"])
    # Its rank led a session of its own, and init may not have noticed yet that it has ended.
    process = Path(f"/proc/{fakes.read_text()}")
    assert not process.exists() or "\nState:\tZ" in (process / "status").read_text()
    assert runner.run(fake("passing")).found == "interrupted"


def test_the_time_of_all_checks_is_bounded() -> None:
    long = Check("long", "does not fit", "fakes:passing", 1000.0)
    code, report = run("--seconds", "600", checks=(long, fake("passing")))
    assert code == 0
    assert (report["checks"]["long"]["result"], report["checks"]["long"]["found"]) == ("not run", "no time left")
    assert report["checks"]["passing"]["result"] == "passed"
    # One that fits may not take longer than there is, whatever it is allowed.
    assert report["checks"]["passing"]["limit_seconds"] == Check("", "", "", 0.0).limit_seconds("cuda")
    runner = runner_module.Runner("cuda", 100.0, num_devices=1)
    assert runner.run(fake("passing", limit=1000.0)).limit_seconds <= 100.0
    late = runner_module.Runner("cuda", -1.0, num_devices=1)
    assert late.run(fake("passing")).found == "no time left"


def test_on_a_cpu_what_needs_a_gpu_says_why() -> None:
    code, report = run("--device", "cpu", checks=(fake("passing", not_on_cpu="there is nothing to pin"),))
    outcome = report["checks"]["passing"]
    assert (code, outcome["result"], outcome["found"]) == (0, "not run", "there is nothing to pin")


def test_a_ledger_beside_the_allocator() -> None:
    mib = 1 << 20

    def row(ledger: int, allocated: int, buffers: int = 0) -> dict[str, Any]:
        kinds = {"buffers": buffers * mib}
        sizes = {"allocated": (allocated + 40) * mib}
        return {"ledger": ledger * mib, "by_kind": kinds, "action": "0B1", "allocator": sizes, "before": 40 * mib}

    assert measured.ledger(row(1000, 1000)) == (1.0, "")
    assert measured.ledger(row(900, 1000))[1] == ""
    low = "the ledger has 800.0 MiB in 0B1 (0.0 of it buffers), the allocator 1000.0 MiB"
    assert measured.ledger(row(800, 1000)) == (0.8, low)
    assert measured.ledger(row(1200, 1000))[1]
    # Messages through gloo are in host memory.
    assert measured.ledger(row(1200, 1000, buffers=150))[1] == ""


def test_peaks_are_not_lost_when_somebody_resets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    stats = {"allocated_bytes.all.peak": 0}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: stats.update({"allocated_bytes.all.peak": 10}))
    device = torch.device("cuda", 0)
    peaks = importlib.import_module("gpu_check.memory_ranks").Peaks(device)
    stats["allocated_bytes.all.peak"] = 99
    peaks.start()
    assert peaks.highest()["allocated"] == 10
    stats["allocated_bytes.all.peak"] = 50
    torch.cuda.reset_peak_memory_stats(device)
    stats["allocated_bytes.all.peak"] = 30
    assert peaks.highest() == {"allocated": 50, "requested": 0, "active": 0, "reserved": 0}


def test_copies_in_a_trace() -> None:
    def event(category: str, name: str, stream: int, start: float, length: float, size: int = 0) -> dict[str, Any]:
        arguments = {"stream": stream, "bytes": size}
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "args": arguments}

    out, back = "Memcpy DtoH (Device -> Pinned)", "Memcpy HtoD (Pinned -> Device)"
    events = [
        {"ph": "M", "name": "process_name"},
        event("kernel", "gemm", 7, 0, 100),
        event("kernel", "gemm", 7, 90, 60),
        event("kernel", "gemm", 7, 200, 100),
        event("gpu_memcpy", out, 20, 100, 100, 5000),  # half of it while the device computes
        event("gpu_memcpy", back, 20, 210, 60, 4000),
        event("gpu_memcpy", back, 7, 300, 10, 3000),  # on the stream that computes
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 20, 300, 10, 2000),
    ]
    found = swap_rank.describe_copies(events)
    assert found["computing_stream"] == 7
    assert (found["beside_out"], found["beside_back"]) == (5000, 4000)
    assert found["hidden"] == pytest.approx((50 + 60) / 160)
    assert found["copies"][f"{back}, stream 7"] == 3000
    assert swap_rank.describe_copies([])["num_kernels"] == 0


def test_what_is_not_equal() -> None:
    comparisons = {
        "loss": {"num_tensors": 2, "num_different": 0, "max_abs_difference": 0.0},
        "gradients": {"num_tensors": 90, "num_different": 3, "max_abs_difference": 1e-07},
    }
    equality = importlib.import_module("gpu_check.equality")
    assert equality._difference(comparisons) == "not equal to one process: 3 of 90 of gradients by up to 1e-07"


def test_what_a_command_says_is_wrong() -> None:
    assert commands.last_error("a warning\nerror: no such file\n  logs: x\n") == "no such file"
    assert (
        commands.last_error("Traceback (most recent call last):\n  ...\nValueError: bad\nmore\n") == "ValueError: bad"
    )
    assert commands.last_error("killed\n") == "killed"
    assert commands.last_error("") == "nothing was written"
