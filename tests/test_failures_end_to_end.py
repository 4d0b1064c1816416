"""Bad input and failure through the real command line: one clear message, exit code 1, no traceback.

What the configuration alone shows is tried in this process, what a single rank finds out with one rank in this process,
and the rest with real ranks.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from vpipe.cli import main
from vpipe.data.bert.meta import BertOptions
from vpipe.data.bert.prepare import prepare_bert
from vpipe.launch.environment import LAST_WORDS_SECONDS
from vpipe.runtime.status import read_status

CHAIN_TOYS = Path(__file__).parent / "train" / "chain_toys.py"
# On a machine that is busy with other things ranks get to their mistakes one long after another.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", LAST_WORDS_SECONDS: "25"}

BERT = """
log_directory: runs
model: {type: bert, num_layers: 2, hidden_size: 16, num_heads: 2, max_position_embeddings: 32}
data: {data_dir: set, sequence_length: 32}
pipeline: {schedule: 1f1b, num_ranks: 2, num_microbatches: 4}
train: {batch_size: 8, iterations: 2}
launch: {device: cpu, threads_per_rank: 1}
"""

CHAIN = """
log_directory: runs
model: {type: custom, entry: 'chain_toys.py:chain'}
data: {type: custom, entry: 'chain_toys.py:data'}
pipeline: {schedule: 1f1b, num_ranks: 2, num_microbatches: 4}
train: {batch_size: 8, iterations: 2}
launch: {device: cpu, threads_per_rank: 1}
"""

# Blocks that take their time, so that ranks wait for each other.
SLOW = """
log_directory: runs
model:
  type: custom
  entry: vpipe.model.emulated:build_emulated_chain
  options: {num_blocks: 3, forward_ms: 20, backward_ms: 5, width: 6}
data: {type: custom, entry: 'chain_toys.py:data'}
pipeline: {schedule: 1f1b, num_ranks: 3, num_microbatches: 4}
train: {batch_size: 8, iterations: 1000, save_model: false}
launch: {device: cpu, threads_per_rank: 1}
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    rng = random.Random(1)
    words = ["rain", "spain", "falls", "plain", "near", "some", "tall", "green", "hill", "noon"]
    documents = [[" ".join(rng.choices(words, k=6)).capitalize() + "." for _ in range(4)] for _ in range(20)]
    (folder / "text.txt").write_text("\n\n".join("\n".join(document) for document in documents))
    options = BertOptions(vocab_size=64, sequence_length=32, eval_fraction=0.3, limit_samples=16)
    prepare_bert([folder / "text.txt"], folder / "set", options)
    return folder / "set"


@pytest.fixture
def folder(tmp_path: Path, prepared: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "set")
    shutil.copy(CHAIN_TOYS, tmp_path)
    for name, text in {"bert": BERT, "chain": CHAIN, "slow": SLOW}.items():
        (tmp_path / f"{name}.yml").write_text(text)
    return tmp_path


def with_overrides(*overrides: str) -> list[str]:
    return [argument for override in overrides for argument in ("--set", override)]


def without_advice(text: str) -> str:
    """Leave out what is said of the few microbatches that these small runs have."""
    return re.sub(r"^warning: pipeline\.num_microbatches is \d+: .*\n", "", text, flags=re.MULTILINE)


def refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, config: Path, *overrides: str
) -> str:
    """Run a command in this process, which has to fail, and return its message."""
    monkeypatch.setattr(sys, "argv", ["vpipe", command, str(config), *with_overrides(*overrides)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    out, err = map(without_advice, capsys.readouterr())
    assert "Traceback" not in out + err
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    return err


CONFIG_MISTAKES = {
    "unknown key": (
        ["pipeline.shedule=gpipe"],
        r"pipeline.shedule = 'gpipe' is not a known key; did you mean 'schedul",
    ),
    "unknown section": (["optimiser.name=sgd"], "'optimizer'"),
    "unknown schedule": (["pipeline.schedule=gpip"], "pipeline.schedule = 'gpip' .*did you mean 'gpipe'"),
    "unknown optimizer": (["optimizer.name=adamx"], "optimizer.name = 'adamx' is not one of 'adam'"),
    "mistyped value": (["train.batch_size=many"], "train.batch_size = 'many' is not a whole number"),
    "no iterations": (["train.iterations=0"], "train.iterations = 0 is not a whole number of at least 1"),
    "partition's sum": (["plan.partition=[2,2]"], r"plan.partition = \[2, 2\]: has 4 blocks .* the model has 5; add 1"),
    "partition's length": (["plan.partition=[2,2,1]"], "has 3 entries for 2 stages; give one block count per stage"),
    "no partition file": (["plan.partition=nowhere.json"], "plan.partition = .*nowhere.json: no such file"),
    "ratio above 1": (["pipeline.recompute_ratio=1.5"], "recompute_ratio = 1.5 is not a number from 0 to 1"),
    "ratio below 0": (["pipeline.recompute_ratio=[0,-1]"], r"recompute_ratio.*-1.*is not a number from 0 to 1"),
    "ratios for others": (["pipeline.recompute_ratio=[0.5]"], "for 2 stages; give one ratio per stage"),
    "too many stages": (["pipeline.num_ranks=6"], "makes 6 stages out of 5 blocks; use at most 5 stages"),
    "microbatches": (
        ["train.batch_size=3"],
        r"batch_size = 3 cannot be cut .* 4 .*use a batch size of at least 4, or at most 3 microbatches",
    ),
    "depths": (["pipeline.stage_to_depth_map=[0,1]"], "stage 1 is deeper .* depths must not grow"),
    "depths' length": (["pipeline.stage_to_depth_map=[1]"], r"has 1 entr.* for 2 stages; give one per stage"),
    "stages on other machines": (["launch.machines=[far:0,far:1]"], "'far' is another machine"),
    "machines": (["launch.machines=[localhost:0]"], "lists 1 for 2 ranks"),
    "port": (["launch.master_port=70000"], "launch.master_port = 70000 is not a port number"),
    "data": (["data.data_dir=null"], "data.data_dir is missing; give the folder that `vpipe data prepare` wrote"),
    "init_from": (["model.init_from=nowhere"], "model.init_from = .*nowhere/config.json: no such file"),
    "tied weights": (
        ["pipeline.schedule=pipedream", "model.tie_weights=true"],
        "model.tie_weights = true .*'pipedream' updates them apart; use a synchronous schedule",
    ),
    "override's form": (["train"], "--set train: is not of the form key=value"),
}


@pytest.mark.parametrize("command", ["train", "verify"])
@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_mistakes_in_the_configuration(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mistake: str, command: str
) -> None:
    overrides, message = CONFIG_MISTAKES[mistake]
    assert re.search(message, refusal(monkeypatch, capsys, command, folder / "bert.yml", *overrides))
    assert not (folder / "runs").exists()


def test_all_mistakes_are_told_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mistakes = ["pipeline.shedule=gpipe", "train.batch_size=3", "optimizer.learning_rate=-1"]
    lines = refusal(monkeypatch, capsys, "train", folder / "bert.yml", *mistakes).splitlines()
    assert lines[0] == f"error: {folder}/bert.yml: 3 errors"
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        ({"module_to_stage_map": [0, 2, 2]}, r"module_to_stage_map = \[0, 2, 2\] does not count stages up"),
        (
            {"stage_to_rank_map": {"0": [1], "1": [0]}},
            "stage_to_rank_map puts stage 0 on rank 1; stages lie .*in order",
        ),
        ({"stage_to_rank_map": {"0": [0, 1]}}, "replicated stages are not supported yet; give each stage one rank"),
        ({"stage_to_rnk_map": {}}, "did you mean 'stage_to_rank_map'"),
    ],
)
def test_wrong_stage_maps(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    maps: dict[str, object],
    message: str,
) -> None:
    (folder / "maps.json").write_text(json.dumps(maps))
    flat = {"model_type": "bert", "synthetic_data": True, "config_file": "maps.json", "batch_size": 8, "epochs": 1}
    (folder / "flat.yml").write_text(json.dumps(flat))
    assert re.search(message, refusal(monkeypatch, capsys, "train", folder / "flat.yml"))


def test_files_and_folders_that_cannot_be_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "nowhere.yml: no such file" in refusal(monkeypatch, capsys, "train", folder / "nowhere.yml")
    assert "Is a directory" in refusal(monkeypatch, capsys, "train", folder)
    (folder / "broken.yml").write_text("train: {batch_size: 8\n")
    assert re.search(r"broken.yml, line 2, column 1: ", refusal(monkeypatch, capsys, "train", folder / "broken.yml"))
    message = refusal(monkeypatch, capsys, "train", folder / "bert.yml", "log_directory=set/meta.json")
    assert re.search("cannot create a run directory in log_directory '.*set/meta.json': Not a directory", message)


def test_a_busy_port(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refusal(monkeypatch, capsys, "train", folder / "chain.yml", f"launch.master_port={port}")
    assert (
        f"launch.master_port {port} cannot be used: Address already in use; choose another, or leave it out" in message
    )


def truncate(folder: Path) -> None:
    os.truncate(folder / "set" / "train" / "input_ids.npy", 100)


def damage(folder: Path) -> None:
    (folder / "set" / "meta.json").write_text("{")


def remove(folder: Path) -> None:
    shutil.rmtree(folder / "set")


DATA_MISTAKES = {
    "missing": (remove, [], r"there is no prepared data in .*set; make it with `vpipe data prepare bert --out "),
    "truncated": (
        truncate,
        [],
        r"input_ids.npy is truncated: 100 bytes, \d+ were written; prepare it again with `vpipe",
    ),
    "damaged": (damage, [], "meta.json is damaged .*; prepare it again with `vpipe data prepare"),
    "vocabulary": (
        None,
        ["model.vocab_size=32"],
        r"vocabulary of \d+ tokens, the model's has 32; set model.vocab_size: ",
    ),
    "length": (
        None,
        ["data.sequence_length=16"],
        "sequences of 32 tokens, the run expects 16; set data.sequence_length",
    ),
    "samples": (None, ["train.batch_size=40"], r"train.batch_size is 40 but the data has \d+ samples; use"),
}
CHAIN_MISTAKES = {
    "partition": (
        ["plan.partition=[2,3]"],
        r"partition \[2, 3\] has 5 blocks in all, and the model has 4; take away 1",
    ),
    "stages": (["pipeline.num_ranks=5"], "5 stages are more than the model's 4 blocks; use at most 4"),
    "no file": (["model.entry=nowhere.py:chain"], "nowhere.py"),
    "no function": (["model.entry=chain_toys.py:chains"], "chain_toys.py.* has no function 'chains'; it has .*chain"),
    "wrong option": (["model.options.width=3"], "width"),
    "failing": (["model.entry=chain_toys.py:failing"], "chain_toys.py:failing.*RuntimeError: no such layer"),
    "no chain": (["model.entry=chain_toys.py:data", "model.options.split=train"], "returned dict, not a vpipe Chain"),
    "field": (["data.entry=chain_toys.py:without_target"], "reads the batch fields input, target, but .* no 'target'"),
}


def rank_refusal(config: Path, *overrides: str) -> str:
    """Be the only rank of a run that has to be refused before it joins the others."""
    from vpipe.config import load_config
    from vpipe.errors import VPipeError
    from vpipe.workload.setup import build_setup

    with pytest.raises(VPipeError) as caught:
        _ = build_setup(load_config(config, overrides)).plan
    return str(caught.value)


@pytest.mark.parametrize("mistake", DATA_MISTAKES)
def test_data_that_is_missing_broken_or_does_not_fit(folder: Path, mistake: str) -> None:
    change, overrides, message = DATA_MISTAKES[mistake]
    if change is not None:
        change(folder)
    assert re.search(message, rank_refusal(folder / "bert.yml", *overrides))


@pytest.mark.parametrize("mistake", CHAIN_MISTAKES)
def test_a_users_own_model_and_data_that_do_not_fit(folder: Path, mistake: str) -> None:
    overrides, message = CHAIN_MISTAKES[mistake]
    assert re.search(message, rank_refusal(folder / "chain.yml", *overrides))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    result.stderr = without_advice(result.stderr)
    return result


def test_what_a_rank_refuses_is_told_once_and_is_in_every_log(folder: Path) -> None:
    truncate(folder)
    result = run("vpipe", "train", folder / "bert.yml")
    assert result.returncode == 1
    first, second = result.stderr.splitlines()
    assert re.match(r"error: rank \d stopped: .*input_ids.npy is truncated: 100 bytes", first)
    (directory,) = (folder / "runs").iterdir()  # a start that was refused is no latest run
    assert second == f"  logs: {directory}/output.log.*"
    for rank in range(2):
        log = (directory / f"output.log.{rank}").read_text()
        assert "input_ids.npy is truncated" in log
        assert "Traceback" not in log


@pytest.mark.parametrize(("array", "culprit"), [("input_ids", 0), ("labels", 1)])
def test_ids_that_were_damaged_in_a_file_of_the_right_size(folder: Path, array: str, culprit: int) -> None:
    np.load(folder / "set" / "train" / f"{array}.npy", mmap_mode="r+")[:, 1] = 30000
    result = run("vpipe", "train", folder / "bert.yml")
    assert result.returncode == 1
    message = (
        rf"{folder}/set/train/{array}.npy is damaged: sample \d+ has the value 30000, and the vocabulary has \d+ "
        r"tokens, so 0 to \d+ can be there; prepare it again with `vpipe data prepare bert --out "
    )
    assert re.match(rf"error: rank {culprit} stopped: {message}", result.stderr)
    assert "Traceback" not in result.stderr
    for rank in range(2):
        log = (folder / "runs" / "latest" / f"output.log.{rank}").read_text()
        assert re.search(message, log)
        assert "Traceback" not in log


def test_a_loss_that_is_no_number(folder: Path) -> None:
    diverging = with_overrides("model.options.last=Diverging", "pipeline.schedule=pipedream")
    result = run("vpipe", "train", folder / "chain.yml", *diverging)
    assert result.returncode == 1
    assert re.match(
        r"error: rank \d stopped: the loss became nan at iteration 1 .*Lower the learning rate", result.stderr
    )
    assert "Traceback" not in result.stderr


def torchrun(num_ranks: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m", "vpipe")
    return run(*launcher, *arguments)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.batch_size=3"], "train.batch_size = 3 cannot be cut"),
        (["pipeline.num_ranks=3"], "pipeline.num_ranks is 3 but 2 ranks were started; start as many, or change it"),
        (["data.entry=chain_toys.py:without_target"], "the data has no 'target', only input"),
        (["model.options.last=Diverging"], "the loss became nan at iteration 1"),
    ],
)
def test_under_torchrun_every_rank_says_it(folder: Path, overrides: list[str], message: str) -> None:
    result = torchrun(2, "train", folder / "chain.yml", *with_overrides(*overrides))
    assert result.returncode == 1
    for rank in range(2):
        (line,) = re.findall(rf"rank {rank} ERROR: (.*)", result.stderr)
        assert message in line
    # A rank's own exit code, in torchrun's report.
    assert re.findall(r"exitcode  : (\S+)", result.stderr) == ["1", "1"]
    assert str(Path("src", "vpipe")) not in result.stderr  # no traceback of a rank


SOON_SECONDS = 25
"""How long the others may go on: by itself torchrun would take 30 s to end them, and they wait 300 s for each other."""


class Training:
    """A run in another process."""

    def __init__(self, folder: Path, *overrides: str, launcher: tuple[str, ...] = ("vpipe",)) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *launcher, "train", str(folder / "slow.yml"), *with_overrides(*overrides)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._runs = folder / "runs"

    def wait_for_start(self) -> None:
        """Wait until it is some iterations on its way."""
        metrics = self._runs / "latest" / "metrics.jsonl"
        self.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3)
        self.directory = (self._runs / "latest").resolve()
        statuses = [read_status(self.directory, rank) for rank in range(3)]
        self.pids = [status.pid for status in statuses if status is not None]
        assert len(self.pids) == 3

    def status(self, rank: int) -> str:
        """Return what a rank says it is doing."""
        status = read_status(self.directory, rank)
        return "" if status is None else status.text

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait for something that the run does."""
        while not is_so():
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.01)

    def suspend(self, rank: int) -> None:
        """Let a rank do nothing any more, and wait until the others wait, and have done so for a second."""
        os.kill(self.pids[rank], signal.SIGSTOP)
        others = [other for other in range(3) if other != rank]
        self.wait_until(lambda: all(self._waits(other) for other in others))

    def _waits(self, rank: int) -> bool:
        status = read_status(self.directory, rank)
        return status is not None and status.text.startswith("waiting") and time.time() - status.written_at > 1

    def stop(self, pid: int, number: signal.Signals) -> tuple[str, float]:
        """Send a signal to a process of the run; return its standard error and the seconds until all had ended."""
        start = time.monotonic()
        os.kill(pid, number)
        _, error = self.process.communicate()
        while any(Path(f"/proc/{pid}").exists() for pid in self.pids):
            time.sleep(0.02)
        return without_advice(error), time.monotonic() - start


@contextmanager
def started(folder: Path, *overrides: str, launcher: tuple[str, ...] = ("vpipe",)) -> Iterator[Training]:
    """Start a run and wait until it is on its way; nothing of it stays behind."""
    training = Training(folder, *overrides, launcher=launcher)
    try:
        training.wait_for_start()
        yield training
    finally:
        training.process.terminate()
        training.process.communicate()


@pytest.mark.parametrize(
    ("schedule", "victim"), [("1f1b", 0), ("1f1b", 1), ("1f1b", 2), ("pipedream", 0), ("pipedream", 2)]
)
def test_kill_minus_nine_ends_all_and_names_who_died_and_what_others_waited_for(
    folder: Path, schedule: str, victim: int
) -> None:
    with started(folder, f"pipeline.schedule={schedule}") as training:
        training.suspend(victim)
        error, seconds = training.stop(training.pids[victim], signal.SIGKILL)
    assert seconds < SOON_SECONDS
    assert training.process.returncode == 1
    assert re.match(rf"error: rank {victim} was killed by signal 9 \(SIGKILL\) while ", error)
    what = r"(?:\d[FB]\d+|the loss|room to send \d[FB]\d+)"
    waits = re.findall(rf"\n  rank (\d) was (?:waiting for|stopping: .* was waiting for) {what}", error)
    assert waits == [str(rank) for rank in range(3) if rank != victim], error
    assert "Traceback" not in error
    for rank in range(3):
        assert f"rank {victim} was killed by signal 9" in (training.directory / f"output.log.{rank}").read_text()


def test_kill_minus_nine_during_an_evaluation(folder: Path) -> None:
    # Of held-out samples there are enough for minutes.
    long = ["train.eval_batch_size=1", "data.options.num_samples=4000", "model.options.forward_ms=[5,200,5]"]
    with started(folder, "train.iterations=3", *long) as training:
        training.wait_until(lambda: training.status(1).startswith("evaluating"))
        error, seconds = training.stop(training.pids[1], signal.SIGKILL)
    assert seconds < SOON_SECONDS
    assert training.process.returncode == 1
    assert re.match(
        r"error: rank 1 was killed by signal 9 \(SIGKILL\) while (evaluating, last done|waiting for) 1", error
    )


def test_kill_minus_nine_under_torchrun(folder: Path) -> None:
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "vpipe")
    with started(folder, launcher=launcher) as training:
        error, seconds = training.stop(training.pids[1], signal.SIGKILL)
    assert seconds < SOON_SECONDS
    assert training.process.returncode == 1
    for rank in (0, 2):
        (line,) = re.findall(rf"rank {rank} ERROR: (.*)", error)
        assert re.search(
            r"rank 1 ended while this rank was waiting for (1[FB]\d+|the loss|room to send [02][FB]\d+)", line
        )


def test_ctrl_c_ends_all_quietly(folder: Path) -> None:
    with started(folder) as training:
        error, seconds = training.stop(training.process.pid, signal.SIGINT)
    assert seconds < SOON_SECONDS
    assert training.process.returncode == 130
    assert error == f"interrupted; all ranks were ended. Logs: {training.directory}/output.log.*\n"
