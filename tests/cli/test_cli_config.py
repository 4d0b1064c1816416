"""`vpipe config` from the outside: output, warnings, errors, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vpipe.cli import main

TEXT = "data: {synthetic_data: true}\ntrain: {iterations: 3, batch_size: 8}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yml"
    path.write_text(TEXT)
    return path


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["vpipe", "config", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    output = capsys.readouterr()
    return code, output.out, output.err


def test_prints_the_resolved_run(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(monkeypatch, capsys, config, "--set", "batch_size=4", "--set", "pipeline.schedule=gpipe")
    assert (code, err) == (0, "")
    tree = yaml.safe_load(out)
    assert tree["train"]["batch_size"] == 4
    assert tree["pipeline"] == {
        "schedule": "gpipe",
        "num_ranks": 1,
        "stages_per_rank": 1,
        "num_microbatches": 1,
        "recompute_ratio": 0.0,
        "recompute": None,
        "stage_to_depth_map": None,
        "macrobatch": False,
        "vertical_sync": False,
        "max_in_flight": None,
        "rank_times": {},
    }


def test_its_output_is_a_config(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = call(monkeypatch, capsys, config)[1]
    (config.parent / "deeper").mkdir()
    again = config.parent / "deeper" / "again.yml"
    again.write_text(first)
    assert call(monkeypatch, capsys, again)[1] == first


def test_json(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(monkeypatch, capsys, config, "--format", "json")
    assert code == 0
    assert json.loads(out)["model"]["vocab_size"] == 30522


def test_warnings_go_to_stderr(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(TEXT + "lr_warmup: true\n")
    code, out, err = call(monkeypatch, capsys, config)
    assert code == 0
    assert err == "warning: lr_warmup has no meaning any more and is ignored; use warmup_iterations\n"
    assert "warning:" not in out


def test_errors_are_one_message_and_exit_code_1(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(monkeypatch, capsys, config, "--set", "train.batchsize=4", "--set", "seed=x")
    assert (code, out) == (1, "")
    assert err == (
        f"error: {config}: 2 errors\n"
        "  seed = 'x' is not a whole number of at least 0\n"
        "  train.batchsize = 4 is not a known key; did you mean 'batch_size'?\n"
    )


def test_a_file_or_the_fields(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(monkeypatch, capsys)
    assert code == 1
    assert "Missing argument 'FILE', or --fields." in err
    code, out, _ = call(monkeypatch, capsys, "--fields")
    assert code == 0
    assert "  train.batch_size: 32\n      Samples per batch" in out


def test_answers_without_torch(config: Path) -> None:
    code = "import sys; from vpipe.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, "config", str(config)], check=True, capture_output=True)
