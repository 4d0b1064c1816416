"""`vpipe sweep` from the outside: runs, simulations, going on, and refusals."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from vpipe.cli import main
from vpipe.cli.sweep import command
from vpipe.planner.profile.profile import BlockProfile, Profile, SizeProfile, write_profile

CHAIN_TOYS = Path(__file__).parents[1] / "train" / "chain_toys.py"
RUN = """
log_directory: logs
model: {type: custom, entry: 'chain_toys.py:chain'}
data: {type: custom, entry: 'chain_toys.py:data'}
pipeline: {schedule: 1f1b, num_ranks: 2, num_microbatches: 2}
train: {batch_size: 8, iterations: 2, eval_batches: 1}
launch: {device: cpu, threads_per_rank: 1}
"""
PAPER = """
data: {synthetic_data: true, sequence_length: 16}
model: {num_layers: 4, hidden_size: 32, num_heads: 2, intermediate_size: 64}
pipeline: {num_ranks: 3, num_microbatches: 4}
train: {iterations: 3, batch_size: 8}
"""
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(CHAIN_TOYS, tmp_path)
    (tmp_path / "run.yml").write_text(RUN)
    (tmp_path / "paper.yml").write_text(PAPER)
    sizes = []
    for samples in (1, 2, 4):
        block = BlockProfile("b", samples, samples, samples, samples, 1000 * samples, 100 * samples, 0, 500)
        sizes.append(SizeProfile(samples, (block,) * 9))
    write_profile(Profile("toy", {"cpu": "toy"}, tuple(sizes)), tmp_path / "profile.json")
    return tmp_path


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["vpipe", "sweep", *arguments])
        with pytest.raises(SystemExit) as raised:
            main()
        shown = capsys.readouterr()
        return int(raised.value.code or 0), shown.out, shown.err

    return run


SIMULATED = ("paper.yml", "--simulate", "--profile", "profile.json")


def table(directory: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((directory / "table.csv").open()))


def test_runs_side_by_side_one_of_which_fails(folder: Path) -> None:
    overs = ["--over", "batch_size=8", "--over", "plan.partition=uniform,[1,1]"]
    shown = subprocess.run(
        [sys.executable, "-m", "vpipe", "sweep", "run.yml", *overs, "-o", "out"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("2 combinations; results in out\n1/2  batch_size=8  plan.partition=uniform  ")
    good, bad = table(folder / "out")
    assert [row["plan.partition"] for row in (good, bad)] == ["uniform", "[1,1]"]
    summary = json.loads((folder / "out" / good["folder"] / "summary.json").read_text())
    for key in ("samples_per_second", "iteration_ms", "bubble_fraction", "final_loss", "eval_loss"):
        assert float(good[key]) == summary[key]
    assert int(good["peak_memory_bytes"]) == max(summary["peak_memory_bytes"])
    assert good["error"] == ""
    assert not (folder / "out" / good["folder"] / "model").exists()
    assert bad["samples_per_second"] == ""
    assert "partition" in bad["error"]
    assert "2/2  batch_size=8  plan.partition=[1,1]  failed\n" in shown.stdout
    assert "failed, 1 of 2: rank " in shown.stdout
    assert "most samples per second: batch_size=8  plan.partition=uniform\n" in shown.stdout
    assert "written: out/table.csv, out/plot.svg" in shown.stdout
    assert (folder / "out" / "plot.svg").read_text().startswith("<svg")


def test_simulations_need_no_torch(folder: Path) -> None:
    code = (
        "import sys; from vpipe.cli import main\n"
        f"sys.argv = ['vpipe', 'sweep', *{SIMULATED!r}, '--over', 'batch_size=4,8', '-o', 'out']\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    rows = table(folder / "out")
    assert [float(row["bubble_fraction"]) for row in rows] == [pytest.approx(1 / 3)] * 2
    assert [int(row["predicted_memory_bytes"]) > 0 for row in rows] == [True, True]


def test_the_default_folder_is_a_new_one_each_time(call: Call, folder: Path) -> None:
    for _ in range(2):
        code, out, _ = call(*SIMULATED, "--over", "batch_size=4,8", "--set", "log_directory=logs")
        assert code == 0
        assert "2 combinations; results in logs/sweeps/" in out
    assert len([path for path in (folder / "logs" / "sweeps").iterdir() if not path.is_symlink()]) == 2


def test_the_same_sweep_goes_on_where_it_was(call: Call, folder: Path) -> None:
    sweep = [*SIMULATED, "--over", "batch_size=4,8,12", "-o", "out"]
    assert call(*sweep)[0] == 0
    whole = (folder / "out" / "rows.jsonl").read_text()
    (folder / "out" / "rows.jsonl").write_text("".join(whole.splitlines(keepends=True)[:2]))
    code, out, _ = call(*sweep)
    assert code == 0
    assert [line.endswith("[kept]") for line in out.splitlines()[1:4]] == [True, True, False]
    assert (folder / "out" / "rows.jsonl").read_text() == whole
    code, _, err = call(*SIMULATED, "--over", "batch_size=4,8", "-o", "out")
    assert code == 1
    assert "--output out: holds another sweep" in err
    assert (folder / "out" / "rows.jsonl").read_text() == whole


def test_what_failed_is_tried_again(call: Call, folder: Path) -> None:
    sweep = [*SIMULATED, "--over", "plan.partition=uniform,cut.json", "-o", "out"]
    code, out, _ = call(*sweep)
    assert code == 0
    assert "failed, 1 of 2: plan.partition = " in out
    assert "cut.json: no such file" in out
    (folder / "cut.json").write_text('{"partition": [2, 3, 4]}')
    code, out, _ = call(*sweep)
    assert "failed" not in out
    assert [row["error"] for row in table(folder / "out")] == ["", ""]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SIMULATED], "Missing option '--over'"),
        ([*SIMULATED, "--over", "batch_size"], "--over batch_size: is not of the form key=value,value,..."),
        ([*SIMULATED, "--over", "batchsize=4,8"],
         "error: paper.yml: no combination can run; with batchsize=4: batchsize = 4 is not a known key; did you mean"),
        (["run.yml", "--over", "batch_size=8", "--profile", "profile.json"], "--profile is for --simulate"),
        (["none.yml", "--over", "batch_size=8"], "none.yml: no combination can run; with batch_size=8: no such file"),
        (["paper.yml", "--over", "seed=1", "--simulate", "--profile", "none.json"], "none.json"),
        ([*SIMULATED, "--over", "seed=1", "-o", "run.yml"], "--output run.yml: cannot be used: Not a directory"),
    ],
)  # fmt: skip
def test_refusals(call: Call, arguments: list[str], message: str) -> None:
    code, _, err = call(*arguments)
    assert code == 1
    assert message in err
    assert "Traceback" not in err


def test_nothing_succeeded(call: Call, folder: Path) -> None:
    code, out, _ = call(*SIMULATED, "--over", "batch_size=64,128", "-o", "out")
    assert code == 1
    assert out.count("failed, 1 of 2: ") == 2
    assert [row["error"] != "" for row in table(folder / "out")] == [True, True]


def test_ctrl_c_keeps_what_is_done(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vpipe.report.sweep import simulation as sweep_simulation

    plain, calls = sweep_simulation.simulate_run, []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sweep_simulation, "simulate_run", interrupted)
    code, _, err = call(*SIMULATED, "--over", "batch_size=4,8,12", "-o", "out")
    assert code == 130
    assert err == "interrupted after 1 of 3; to go on, repeat the command with --output out\n"
    assert len(table(folder / "out")) == 1


def test_help_explains() -> None:
    shown = CliRunner().invoke(command, ["--help"]).output
    for word in ("--over", "--simulate", "table.csv", "plot.svg", "samples_per_second", "predicted_memory_bytes"):
        assert word in shown
