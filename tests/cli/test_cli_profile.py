"""`vpipe profile` from the outside: it measures on real ranks, remembers, and refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vpipe.planner.profile.profile import read_profile

CHAIN_TOYS = Path(__file__).parents[1] / "train" / "chain_toys.py"
TEXT = """
log_directory: runs
model: {type: custom, entry: 'chain_toys.py:chain'}
data: {type: custom, entry: 'chain_toys.py:data'}
pipeline: {schedule: 1f1b, num_ranks: 2, num_microbatches: 4}
train: {batch_size: 8, iterations: 7}
launch: {device: cpu, threads_per_rank: 1}
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "vpipe", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    # Without what is said of the few microbatches that these small runs have.
    result.stderr = re.sub(r"^warning: pipeline\.num_microbatches is .*\n", "", result.stderr, flags=re.MULTILINE)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("profile")
    shutil.copy(CHAIN_TOYS, folder)
    (folder / "run.yml").write_text(TEXT)
    return folder


def test_it_measures_once_and_plans_from_that(folder: Path) -> None:
    first = run(folder, "profile", "run.yml", "-o", "profile.json")
    assert first.returncode == 0, first.stderr
    assert "measuring blocks, microbatches of 2" in first.stderr
    for words in (
        "block.1 (+1)",
        "forward ms",
        "Links between ranks: ",
        "Host memory",
        "ranks 2",
        "written to profile",
    ):
        assert words in first.stdout
    profile = read_profile(folder / "profile.json")
    assert profile.microbatch_sizes == (2,)
    assert profile.link.latency_ms + profile.dispatch_ms > 0
    assert profile.host is not None
    (cached,) = (folder / "cache" / "vpipe" / "profiles").iterdir()
    assert cached.stem == profile.fingerprint
    planned = run(folder, "plan", "run.yml", "--format", "json")
    assert planned.returncode == 0
    (told,) = planned.stderr.splitlines()  # no progress: nothing was measured
    assert re.fullmatch(rf"profile: measured .*, from {cached}; `vpipe profile --no-cache` measures again", told)
    plan = json.loads(planned.stdout)
    assert plan["profile"] == profile.fingerprint
    assert sum(plan["partition"]) == 4


def test_what_costs_no_time_needs_no_new_measurement(folder: Path) -> None:
    cheap = ("seed=3", "optimizer.learning_rate=0.5", "optimizer.weight_decay=0.1", "train.iterations=2")
    again = run(folder, "profile", "run.yml", *(text for change in cheap for text in ("--set", change)))
    assert again.returncode == 0
    assert again.stderr.startswith("profile: measured ")
    result = run(folder, "plan", "run.yml", "--profile", "profile.json", "--set", "model.options={last: Stumbling}")
    assert result.returncode == 1
    assert "model.options = {}, and the run has {'last': 'Stumbling'}" in result.stderr


def test_mistakes_are_told_in_one_line(folder: Path) -> None:
    for arguments, words in (
        (("--microbatches", "3"), "train.batch_size = 8 cannot be cut into 3 equal microbatches"),
        (("--set", "model.options={last: Stumbling}"), "surprise"),
    ):
        result = run(folder, "profile", "run.yml", *arguments)
        assert result.returncode == 1
        assert words in result.stderr
        assert "Traceback" not in result.stderr
