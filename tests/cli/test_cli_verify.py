"""`vpipe verify` from the outside: its table, its JSON, its exit code, and what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vpipe.cli import main

CHAIN_TOYS = Path(__file__).parents[1] / "train" / "chain_toys.py"
TEXT = """
log_directory: runs
model: {type: custom, entry: 'chain_toys.py:chain'}
data: {type: custom, entry: 'chain_toys.py:data'}
pipeline: {schedule: 1f1b, num_ranks: 2, num_microbatches: 4}
train: {batch_size: 8, iterations: 7}
launch: {device: cpu, threads_per_rank: 1}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(CHAIN_TOYS, tmp_path)
    (tmp_path / "run.yml").write_text(TEXT)
    return tmp_path


def verify(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vpipe", "verify", "run.yml", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run_that_is_equal(folder: Path) -> None:
    result = verify(folder, "--set", "pipeline.schedule=pipedream", "--iterations", "3")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "              compared  different  largest difference",
        "loss                 3          0                   0",
        "gradients           96          0                   0",
        "parameters           8          0                   0",
        "optimizer           24          0                   0",
        "evaluation           1          0                   0",
        "pipedream on 2 ranks against one process with the same delays: equal, bit for bit",
    ]
    progress = result.stderr.splitlines()
    assert progress[0] == "training 3 iterations: pipedream on 2 ranks"
    assert "iteration 3/3" in progress[3]
    assert progress[-1] == "training 3 iterations: one process"
    (directory,) = (folder / "runs").iterdir()  # a run that only verifies is no latest one
    left = [path for path in directory.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in left) < 10_000


def test_a_run_that_is_different(folder: Path) -> None:
    different = ("--set", "model.options.last=RankDependent")
    result = verify(folder, *different, "--format", "json", "--iterations", "1")
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert report["equal"] is False
    assert set(report["max_abs_difference"]) == {"loss", "gradients", "parameters", "optimizer", "evaluation"}
    assert all(difference > 0 for difference in report["max_abs_difference"].values())
    assert report["comparisons"]["gradients"]["first_different"] == "update 1: block.0.linear.weight"


def test_a_run_that_fails_leaves_nothing_big(folder: Path) -> None:
    result = verify(folder, "--set", "model.options.last=Stumbling")
    assert result.returncode == 1
    assert "error: rank 1 failed: ValueError: surprise (the traceback is in " in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(folder.rglob("*.pt"))


def test_torchrun_is_not_for_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["vpipe", "verify", str(folder / "run.yml")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    assert "`vpipe verify` starts its ranks itself; run `vpipe verify" in capsys.readouterr().err
