"""`vpipe train` from the outside: what it prints and leaves, by itself and under torchrun."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vpipe.cli import main
from vpipe.config import load_config

CHAIN_TOYS = Path(__file__).parents[1] / "train" / "chain_toys.py"
FILES = {
    *("config.yml", "plan.json", "metrics.jsonl", "timeline.json", "summary.json", "model"),
    *("output.log.0", "output.log.1"),
}
TEXT = """
log_directory: runs
model: {type: custom, entry: 'chain_toys.py:chain'}
data: {type: custom, entry: 'chain_toys.py:data'}
pipeline: {schedule: 1f1b, num_ranks: 2, num_microbatches: 4}
train: {batch_size: 8, iterations: 7, print_frequency: 3, eval_frequency: 5, eval_batch_size: 6}
launch: {device: cpu, threads_per_rank: 1}
"""
WAITING = (
    "warning: pipeline.num_microbatches is 4: each of 2 ranks waits for 20% of the time (stages of equal time); "
    "num_microbatches = 8, which batch_size 8 allows, makes it 11%\n"
)
LOG_LINES = (
    r"Finished initializing process group; backend: gloo, rank: {rank}, world size: 2",
    r"Stage: {rank}, rank in stage: 0, blocks {first} to {last} \(block.{first} to block.{last}\)",
    r"Epoch: \[0\]\[1/5\]  Iteration: 1/7  Loss: \d+\.\d+  Samples/s: \d+\.\d",
    r"Epoch: \[0\]\[3/5\]  Iteration: 3/7  Loss: ",
    r"Iteration: 5  Held-out loss: \d+\.\d+",
    r"Epoch: \[1\]\[2/5\]  Iteration: 7/7  Loss: ",
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    shutil.copy(CHAIN_TOYS, tmp_path)
    (tmp_path / "run.yml").write_text(TEXT)
    return tmp_path / "run.yml"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def check_logs(directory: Path) -> None:
    for rank in range(2):
        log = (directory / f"output.log.{rank}").read_text()
        for line in LOG_LINES:
            assert re.search(line.format(rank=rank, first=2 * rank, last=2 * rank + 1), log), line


def test_a_run_shows_how_it_gets_on_and_what_came_out(config: Path) -> None:
    result = run(config.parent, "vpipe", "train", "run.yml", "--set", "pipeline.schedule=gpipe")
    assert (result.returncode, result.stderr) == (0, WAITING)
    directory = (config.parent / "runs" / "latest").resolve()
    logs = [(directory / f"output.log.{rank}").read_text() for rank in range(2)]
    assert "With num_microbatches = 4 each of 2 ranks waits for 20% of the time" in logs[0]
    assert [text.count("ranks waits for") for text in logs] == [1, 0]
    lines = result.stdout.splitlines()
    assert lines[0] == f"gpipe, 2 ranks, 4 microbatches of 2; logs in runs/{directory.name}"
    shown = [line.split("  ")[0] for line in lines[1:7]]
    assert shown == [f"iteration {number}/7" for number in (1, 3, 5, 6, 7, 7)]
    for start in ("final loss ", "held-out loss ", "throughput ", "time per iteration ", "rank 0 ", "rank 1 "):
        assert any(line.startswith(start) for line in lines)
    assert max(map(len, lines[1:])) <= 80
    assert all(line == line.rstrip() for line in lines)
    assert {path.name for path in directory.iterdir()} == FILES
    assert "Warning" not in (directory / "output.log.0").read_text()
    check_logs(directory)


def test_under_torchrun_it_prints_and_leaves_the_same(config: Path) -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "vpipe")
    result = run(config.parent, *launcher, "train", "run.yml")
    assert result.returncode == 0, result.stderr
    directory = (config.parent / "runs" / "latest").resolve()
    assert {path.name for path in directory.iterdir()} == FILES
    check_logs(directory)
    for rank in range(2):
        assert f"rank {rank} INFO: Stage: {rank}, rank in stage: 0" in result.stderr
    assert result.stdout.count("final loss ") == 1
    summary = json.loads((directory / "summary.json").read_text())
    assert f"final loss          {summary['final_loss']:.4f}" in result.stdout


def test_the_latest_run_is_an_input_of_the_next(config: Path) -> None:
    """The path leads to the new run as soon as that has begun, and may not be followed again."""
    short = ("--set", "train.iterations=1", "--set", "train.eval_batches=0")
    assert run(config.parent, "vpipe", "train", "run.yml", *short, "--set", "plan.partition=[1,3]").returncode == 0
    first = (config.parent / "runs" / "latest").resolve()
    from_latest = ("--set", "plan.partition=runs/latest/plan.json")
    result = run(config.parent, "vpipe", "train", "run.yml", *short, *from_latest)
    assert (result.returncode, result.stderr) == (0, WAITING)
    second = (config.parent / "runs" / "latest").resolve()
    assert second != first
    assert load_config(second / "config.yml").plan.partition == [1, 3]


def test_a_start_that_is_refused_is_no_latest_run(config: Path) -> None:
    result = run(config.parent, "vpipe", "train", "run.yml", "--set", "data.entry=chain_toys.py:without_target")
    assert result.returncode == 1
    assert not (config.parent / "runs" / "latest").is_symlink()


@pytest.mark.parametrize("command", ["train", "verify"])
def test_the_help_says_how_it_is_used(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vpipe", command, "--help"])
    main()
    text = capsys.readouterr().out
    assert f"Usage: vpipe {command} [OPTIONS] CONFIG" in text
    assert "--set KEY=VALUE" in text


def test_mistakes_are_told_without_waiting_for_torch(config: Path) -> None:
    code = (
        "import sys; from vpipe.cli import main\n"
        "sys.argv = ['vpipe', 'train', 'run.yml', '--set', 'train.batch_size=1']\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    result = run(config.parent, "timeit", "-n1", "-r1", code)
    assert "False" in result.stdout
    assert "train.batch_size = 1 cannot be cut" in result.stderr
