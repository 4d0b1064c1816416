"""Runs that plan themselves, from the command line to the files they leave; and limits that cannot be kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from train_toys import write_chain_config

from vpipe.words.units import format_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run's file, and a cache of profiles that all tests share."""
    return write_chain_config(tmp_path_factory.mktemp("planned")).parent


def train(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    options = [text for override in overrides for text in ("--set", override)]
    return subprocess.run(
        [sys.executable, "-m", "vpipe", "train", "chain.yml", "--set", "plan.partition=auto", *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )


def latest(folder: Path) -> Path:
    return (folder / "runs" / "latest").resolve()


def test_a_planned_run_says_what_was_predicted_and_what_came(folder: Path) -> None:
    result = train(folder)
    assert result.returncode == 0, result.stderr
    run = latest(folder)
    plan, summary = (json.loads((run / name).read_text()) for name in ("plan.json", "summary.json"))
    assert sum(plan["partition"]) == len(plan["policies"]) == 4
    predicted, found = plan["predicted"], summary["prediction"]
    assert 0 < predicted["lower_bound_ms"] <= predicted["step_ms"] * (1 + 1e-9)
    assert found["step_ms"]["predicted"] == predicted["step_ms"]
    assert found["step_ms"]["measured"] == summary["iteration_ms"] > 0
    assert [rank["predicted"] for rank in found["memory_bytes"]] == [
        memory["total"] for memory in predicted["memory_bytes"]
    ]
    assert [rank["measured"] for rank in found["memory_bytes"]] == summary["peak_ledger_bytes"]
    for each in (found["step_ms"], *found["memory_bytes"]):
        assert each["error"] == pytest.approx(each["predicted"] / each["measured"] - 1)
    notes = [json.loads(line) for line in (run / "planning.jsonl").read_text().splitlines()]
    assert any(note.get("text", "").startswith("Plan: 1f1b, 4 x 2 samples") for note in notes)


def test_the_profile_is_measured_once(folder: Path) -> None:
    for _ in range(2):
        assert train(folder, "train.iterations=2").returncode == 0
    notes = [json.loads(line) for line in (latest(folder) / "planning.jsonl").read_text().splitlines()]
    assert not any("step" in note for note in notes)
    assert len(list((folder / "cache" / "vpipe" / "profiles").iterdir())) == 1


def test_the_run_of_a_plan_file_is_compared_with_it(folder: Path) -> None:
    assert train(folder, "train.iterations=2").returncode == 0
    planned = json.loads((latest(folder) / "plan.json").read_text())
    shutil.copy(latest(folder) / "plan.json", folder / "p.json")
    result = train(folder, "train.iterations=2", "plan.partition=p.json", "pipeline.num_microbatches=auto")
    assert result.returncode == 0, result.stderr
    again, summary = (json.loads((latest(folder) / name).read_text()) for name in ("plan.json", "summary.json"))
    same = ("partition", "policies", "schedule", "num_microbatches", "predicted")
    assert [again[key] for key in same] == [planned[key] for key in same]
    assert summary["prediction"]["step_ms"]["predicted"] == planned["predicted"]["step_ms"]
    assert len(summary["prediction"]["memory_bytes"]) == 2


def test_a_limit_that_cannot_be_kept_is_refused_on_every_rank_before_anything_starts(folder: Path) -> None:
    result = train(folder, "plan.memory_limit=600")
    assert result.returncode == 1
    found = re.search(
        r"memory_limit 600 bytes \(600 B\) cannot be kept: the smallest that can is (\d+) bytes \((.*?)\)",
        result.stderr,
    )
    assert found is not None, result.stderr
    smallest = int(found[1])
    assert smallest > 600
    assert found[2] == format_bytes(smallest)
    run = max(path for path in (folder / "runs").iterdir() if not path.is_symlink())
    assert run != latest(folder)  # it never began
    for rank in range(2):
        log = (run / f"output.log.{rank}").read_text()
        assert f"the smallest that can is {smallest} bytes" in log
        assert "Stage: " not in log
    assert not {"plan.json", "metrics.jsonl", "summary.json"} & {path.name for path in run.iterdir()}
