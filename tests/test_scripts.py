"""The developer's scripts: they exist, call each other, and set up once."""

from __future__ import annotations

import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [ROOT / "scripts" / name for name in ("setup", "demo", "test", "check", "gpu-check")] + [ROOT / ".ci" / "run"]

# Stands in for an interpreter: is recent or not, "makes" an environment by copying itself, logs what pip is asked.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
    *version_info*) exit {recent} ;;
    --version) echo "Python 3.x" ;;
    "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip "*) echo "$*" >>{log} ;;
esac
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_strict_executable_bash(script: Path) -> None:
    text = script.read_text()
    assert script.stat().st_mode & stat.S_IXUSR
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    subprocess.run(["bash", "-n", script], check=True)


def _commands(script: str) -> list[str]:
    lines = (ROOT / script).read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def test_ci_calls_the_developers_scripts() -> None:
    check, test, other = _commands(".ci/run")[-3:]
    assert (check, test) == ("scripts/check", "scripts/test")
    script, option, *suites = other.split()
    assert (script, option) == ("scripts/test", "--oldest-kernels")
    assert suites
    assert all((ROOT / suite).exists() for suite in suites)


# One operation each of MKL, oneDNN and ATen, on numbers that are the same for all kernels.
KERNELS = """
import torch
value = (torch.arange(16 * 48) * 7919 % 1009).view(16, 48) / 1009 - 0.5
results = torch.nn.functional.linear(value, value), torch.nn.functional.gelu(value), value.softmax(-1)
print(torch.backends.cpu.get_cpu_capability(), *(bytes(result.numpy()).hex() for result in results))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables are for x86-64")
def test_the_oldest_kernels_are_not_this_processors_own() -> None:
    (line,) = (line for line in _commands("scripts/test") if line.startswith("export ATEN"))
    oldest = dict(word.split("=") for word in line.split()[1:])
    plain = {name: value for name, value in os.environ.items() if name not in oldest}
    own, other = (
        subprocess.run(
            [sys.executable, "-c", KERNELS], env=plain | variables, capture_output=True, text=True, check=True
        ).stdout.split()
        for variables in ({}, oldest)
    )
    if not own[0].startswith("AVX"):
        pytest.skip("this processor has the oldest kernels alone")
    assert other[0] == "DEFAULT"
    # A library that no longer read its variable would make the run with other kernels a repetition.
    assert [mine == theirs for mine, theirs in zip(own[1:], other[1:], strict=True)] == [False] * 3


@pytest.mark.parametrize("script", ["scripts/demo", "scripts/test", "scripts/check"])
def test_every_script_sets_up_first(script: str) -> None:
    assert _commands(script)[2] == "scripts/setup"


def test_constraints_pin_every_requirement_exactly() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    assert "torch==2.13.0" in lines
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [item for extra in project["optional-dependencies"].values() for item in extra]
    pinned = {line.split("==")[0].lower() for line in lines}
    assert {re.split(r"[><=~!\[;]", item)[0].lower() for item in wanted} - pinned == set()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup", tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _setup(checkout: Path, *, recent: bool) -> subprocess.CompletedProcess[str]:
    python = checkout / "fake_python"
    python.write_text(FAKE_PYTHON.format(recent=0 if recent else 1, log=checkout / "pip.log"))
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python)}
    return subprocess.run([checkout / "scripts" / "setup"], cwd="/", env=environment, capture_output=True, text=True)


def test_setup_installs_torch_first_and_only_once(checkout: Path) -> None:
    assert _setup(checkout, recent=True).returncode == 0
    log = checkout / "pip.log"
    torch, package = log.read_text().splitlines()
    assert torch.endswith("--constraint constraints.txt torch==2.13.0")
    assert package.endswith("--constraint constraints.txt --editable .[dev,lamb,plots]")
    again = _setup(checkout, recent=True)
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert len(log.read_text().splitlines()) == 2
    with (checkout / "constraints.txt").open("a") as constraints:
        constraints.write("new==1.0\n")
    assert _setup(checkout, recent=True).returncode == 0
    assert len(log.read_text().splitlines()) == 4


def test_setup_refuses_an_old_python(checkout: Path) -> None:
    result = _setup(checkout, recent=False)
    assert result.returncode == 1
    assert "not Python 3.11 or newer" in result.stderr
    assert not (checkout / ".venv").exists()
