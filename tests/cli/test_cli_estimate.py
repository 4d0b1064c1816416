"""`vpipe estimate` from the outside: what it prints and writes, and how it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from vpipe.cli import main
from vpipe.config import load_config
from vpipe.config.original.files import read_partition_file
from vpipe.planner.estimate.devices import DEVICES

Call = Callable[..., tuple[int, str, str]]
RUN = """
data: {synthetic_data: true, sequence_length: 16}
model: {type: gpt, num_layers: 3, hidden_size: 32, num_heads: 2, vocab_size: 100}
pipeline: {num_ranks: 2, num_microbatches: 4}
train: {iterations: 3, batch_size: 8}
"""


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vpipe", "estimate", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "run.yml").write_text(RUN)
    return tmp_path / "run.yml"


def test_estimates_a_published_model(call: Call) -> None:
    code, out, err = call("--model", "bert-base", "--ranks", 2, "--device", "v100-16gb", "--batch-size", 16)
    assert (code, err) == (0, "")
    for words in (
        "Model: bert-base, 110,106,428 parameters, 25 blocks (4 kinds), 512 tokens per sample",
        "Devices: 2 x v100-16gb (2 ranks): 40% of 125 TFLOP/s fp16, 90% of 900 GB/s",
        "Links between ranks: infiniband-hdr",
        "Bytes per parameter: 16 (weights 2, gradients 2, optimizer 12); activations in fp16",
        "at most 14.4 GiB of 16 GiB",
        "tokens/s",
        "Limited by",
        "Plan: 1f1b",
    ):
        assert words in out


def test_estimates_a_run_and_writes_its_plan(call: Call, run_file: Path) -> None:
    plan = run_file.parent / "plan.json"
    code, out, _ = call("--model", run_file, "--memory-limit", "70MB", "--dtype", "fp32", "-o", plan)
    assert code == 0
    assert "Model: gpt, " in out
    assert "written to" in out
    assert len(read_partition_file(plan).policies) == 8
    assert load_config(run_file, [f"plan.partition={plan}"]).plan.partition == json.loads(plan.read_text())["partition"]


def test_json_says_what_was_assumed(call: Call, run_file: Path) -> None:
    code, out, _ = call(
        "--model", run_file, "--format", "json", "--ranks", 3, "--batch-size", 12, "--microbatch-size", "2,4",
        "--weight-bytes", 2, "--gradient-bytes", 4, "--optimizer-bytes", 10, "--matmul-fraction", 0.5,
        "--link", "5us,25GB/s", "--no-swap", "--devices-per-rank", 2, "--schedule", "gpipe,1f1b",
    )  # fmt: skip
    assert code == 0
    content = json.loads(out)
    told = content["estimate"]
    assert content["microbatch_size"] in (2, 4)
    assert len(content["partition"]) == 3
    assert (told["num_devices"], told["devices_per_rank"], told["tokens_per_sample"]) == (6, 2, 16)
    assert told["assumed"] == {
        "compute": "bf16",
        "peak_tflops": 312.0,
        "matmul_fraction": 0.5,
        "memory_gb_per_s": 2039.0,
        "memory_fraction": 0.9,
        "kernel_us": 4.0,
        "link": {"name": "5us,25GB/s", "latency_us": 5.0, "gb_per_s": 25.0},
        "host_gb_per_s": None,
        "weight_bytes": 2,
        "gradient_bytes": 4,
        "optimizer_bytes": 10,
        "memory_limit_bytes": int(0.9 * (80 << 30)),
        "attention": "flash",
        "masked_share": None,
    }


def test_several_schedules_and_stages_per_rank(call: Call, run_file: Path) -> None:
    code, out, _ = call(
        "--model", run_file, "--schedule", "interleaved", "--stages-per-rank", 2, "--format", "json",
        "--microbatch-size", 1,
    )  # fmt: skip
    assert code == 0
    assert (json.loads(out)["stages_per_rank"], len(json.loads(out)["partition"])) == (2, 4)
    code, out, _ = call("--model", run_file, "--schedule", "auto", "--format", "json")
    assert code == 0
    assert json.loads(out)["synchronous"]


def test_a_device_of_ones_own(call: Call, run_file: Path) -> None:
    path = run_file.parent / "mine.json"
    path.write_text(json.dumps(asdict(DEVICES["a100-40gb"]) | {"name": "mine", "memory_bytes": 1 << 30}))
    code, out, _ = call("--model", run_file, "--device", path)
    assert code == 0
    assert "Devices: 2 x mine" in out


def test_the_tables_are_listed(call: Call) -> None:
    code, out, _ = call("--list")
    assert code == 0
    for words in ("gpt3-175b", "llama-70b", "a100-80gb", "bf16 312", "infiniband-hdr", "NVIDIA A100"):
        assert words in out


def test_help_explains(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    for words in ("gpt3-175b --ranks 64 --device a100-80gb", "smallest_limit_bytes", "data sheet", "--optimizer-bytes"):
        assert words in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt3"], "unknown model 'gpt3'; did you mean 'gpt2'?; known are bert-base, bert-large, gpt2, "),
        (["--model", "gpt2", "--device", "a100"], "unknown device 'a100'; did you mean"),
        (["--model", "gpt2", "--link", "infiniban"], "unknown link 'infiniban'; did you mean 'infiniband-"),
        (["--model", "gpt2", "--device", "v100-16gb", "--dtype", "bf16"], "v100-16gb has no peak for bf16; use one of"),
        (["--model", "gpt2", "--schedule", "1f1bb"], "unknown schedule '1f1bb'; did you mean '1f1b'?"),
        (["--model", "gpt2", "--weight-bytes", 4, "--gradient-bytes", 2], "gradients of 2 bytes with weights of 4"),
        (["--model", "gpt2", "--memory-limit", "many"], "'many' is no size"),
        (["--model", "gpt2", "--microbatch-size", "3"], "--microbatch-size 3 does not divide the batch of 64"),
        (["--model", "gpt2", "--ranks", 27], "the model's 26 blocks cannot be cut into 27 stages; use fewer ranks"),
        (["--model", "gpt2", "--sequence-length", 2048], "samples of 2048 tokens do not fit a model with"),
        (["--model", "gpt2", "--ranks", 2, "--memory-limit", "100MiB"], "cannot be kept: the smallest that can is"),
        (["--model", "nowhere.yml"], "nowhere.yml"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_is_told_in_one_line(call: Call, arguments: list[object], message: str) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--microbatch-size", "2,x"], "--microbatch-size '2,x' is no list of whole numbers from 1 on"),
        (["--sequence-length", 8], "--sequence-length is for published models"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    call: Call, run_file: Path, arguments: list[object], message: str
) -> None:
    code, _, err = call("--model", run_file, *arguments)
    assert code == 1
    assert message in err
