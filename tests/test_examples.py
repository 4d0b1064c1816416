"""The examples do what they say: under torchrun on two ranks, and from the command line."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
LAST_LOSS = {"custom_chain.py": 0.2, "predict.py": 0.25, "train_asynchronous.py": 0.2, "train_sequential.py": 0.15}


def run(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(output):
    return [float(number) for number in re.findall(r"(?<!-out )loss ([\d.]+)", output)]


@pytest.fixture(scope="module")
def outputs():
    """Return a function from a script's name to what its two ranks print."""
    known = {}

    def find(script):
        if script not in known:
            known[script] = run("torch.distributed.run", "--nproc-per-node", "2", f"examples/{script}")
        return known[script]

    return find


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_trains_on_two_ranks(outputs, script):
    found = losses(outputs(script))
    assert found[-1] < LAST_LOSS[script]
    assert found[-1] < found[0]


def test_any_number_of_ranks_gives_the_same_losses(outputs):
    alone = run("torch.distributed.run", "--nproc-per-node", "1", "examples/train_sequential.py")
    assert alone == outputs("train_sequential.py")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_how_to_run_it(script):
    documentation = ast.get_docstring(ast.parse((EXAMPLES / script).read_text()))
    assert f"torchrun --nproc-per-node 2 examples/{script}" in documentation


def test_predictions_are_what_the_metric_says(outputs):
    (last,) = re.findall(r"accuracy ([\d.]+), right answers (\d+) of 100", outputs("predict.py"))
    assert round(100 * float(last[0])) == int(last[1]) > 80


def test_a_chain_of_your_own_is_trained_from_a_file(tmp_path):
    output = run("vpipe", "train", "examples/custom.yml", "--set", f"log_directory={tmp_path}")
    (folder,) = {path.resolve().parent for path in tmp_path.glob("*/summary.json")}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["iterations"] == 64
    assert summary["eval_loss"] < 0.2
    assert summary["eval_metrics"]["accuracy"] > 0.9
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert summary["metrics"] == [record["metrics"] for record in records if "metrics" in record][-1]
    assert records[-1]["eval_metrics"] == summary["eval_metrics"]
    assert "held-out loss" in output


def test_a_chain_of_your_own_is_verified_bit_for_bit(tmp_path):
    output = run(
        *("vpipe", "verify", "examples/custom.yml", "--format", "json", "--set", f"log_directory={tmp_path}"),
        *("--set", "pipeline.schedule=pipedream"),
    )
    report = json.loads(output)
    assert report["equal"] is True
    assert set(report["max_abs_difference"].values()) == {0.0}
