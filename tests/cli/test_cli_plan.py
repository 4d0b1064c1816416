"""`vpipe plan` from the outside: what it prints and writes, and how it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vpipe.cli import main
from vpipe.config import read_config
from vpipe.config.original.files import read_partition_file
from vpipe.planner.profile.profile import BlockProfile, LinkProfile, Profile, SizeProfile, write_profile
from vpipe.workload.setup import build_setup

TEXT = """
data: {synthetic_data: true, sequence_length: 16}
model: {num_layers: 4, hidden_size: 32, num_heads: 2, intermediate_size: 64}
pipeline: {num_ranks: 3, num_microbatches: 4}
train: {iterations: 3, batch_size: 8}
"""
DOCUMENT = Path(__file__).parents[2] / "docs" / "planner.md"
Call = Callable[..., tuple[int, str, str]]


def _profile(num_blocks: int = 9) -> Profile:
    def blocks(samples: int) -> tuple[BlockProfile, ...]:
        return tuple(
            BlockProfile(
                name=f"block.{index}",
                forward_ms=0.5 * samples * (1 + 2 * (index == num_blocks - 1)),
                input_grad_ms=0.5 * samples,
                weight_grad_ms=0.5 * samples,
                recompute_ms=0.5 * samples,
                activation_bytes=1000 * samples,
                input_bytes=100 * samples,
                output_bytes=100 * samples if index < num_blocks - 1 else 0,
                parameter_bytes=500,
            )
            for index in range(num_blocks)
        )

    sizes = tuple(SizeProfile(samples, blocks(samples)) for samples in (1, 2, 4))
    made_of = {"model.hidden_size": "32", "data.sequence_length": "16", "optimizer.name": "'adamw'"}
    return Profile("toy", {"ranks": "3"}, sizes, LinkProfile(0.01, 1e6), made_of=made_of)


def test_a_profile_of_another_machine_is_told(call: Call) -> None:
    code, out, err = call("--set", "pipeline.num_ranks=2")
    assert code == 0
    assert out.startswith("Plan: ")
    assert err.startswith("warning: ")
    assert err.endswith("profile.json was measured with ranks 3 (here 2): times hold for that\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yml").write_text(TEXT)
    write_profile(_profile(), tmp_path / "profile.json")
    return tmp_path


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object, profile: str | None = "profile.json") -> tuple[int, str, str]:
        given = [] if profile is None else ["--profile", str(folder / profile)]
        monkeypatch.setattr(sys, "argv", ["vpipe", "plan", str(folder / "run.yml"), *given, *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def test_explains_the_plan(call: Call) -> None:
    code, out, err = call()
    assert code == 0
    assert err == (
        "warning: pipeline.num_microbatches is 4: each of 3 ranks waits for 33% of the time (stages of equal time); "
        "num_microbatches = 8, which batch_size 8 allows, makes it 20%\n"
    )
    for words in (
        "Plan: 1f1b, 4 x 2 samples, partition [4, 3, 2]",
        "ms per sample",
        "block.0 to block.3",
        "all kept",
        "activations",
        "Bottleneck: stage 0 on rank 0",
        "No plan of the settings looked at needs less than",
        "uniform",
        "Smallest limit that can be kept",
    ):
        assert words in out


def test_the_file_can_be_a_runs_partition(call: Call, folder: Path) -> None:
    code, out, _ = call("-o", folder / "plan.json", "--memory-limit", "11.5kB")
    assert code == 0
    assert "written to" in out
    plan = json.loads((folder / "plan.json").read_text())
    theirs = read_partition_file(folder / "plan.json")
    assert theirs.partition == plan["partition"]
    assert theirs.recompute_ratio == plan["recompute_ratio"]
    assert "recompute" in plan["policies"]
    assert all(memory["total"] <= 11_500 for memory in plan["predicted"]["memory_bytes"])
    loaded = read_config(folder / "run.yml", [f"plan.partition={folder / 'plan.json'}"])
    assert not [text for text in loaded.warnings if "ranks waits for" not in text]
    assert loaded.config.plan.partition == theirs.partition
    assert loaded.config.plan.predicted == plan["predicted"]


def test_json_and_auto(call: Call) -> None:
    code, out, _ = call("--format", "json", "--microbatches", "auto", "--schedule", "auto")
    assert code == 0
    content = json.loads(out)
    assert sum(content["partition"]) == 9
    assert content["num_microbatches"] * content["microbatch_size"] == 8
    assert content["schedule"] != "1f1b"
    assert content["predicted"]["lower_bound_ms"] <= content["predicted"]["step_ms"] * (1 + 1e-9)
    assert len(content["policies"]) == 9


def test_a_schedule_has_as_many_stages_as_a_run_of_it(call: Call) -> None:
    for name, number in (("zb-v", 6), ("interleaved", 6), ("gpipe", 3)):
        code, out, _ = call("--format", "json", "--schedule", name)
        assert code == 0
        assert (json.loads(out)["schedule"], len(json.loads(out)["partition"])) == (name, number)
    chosen = json.loads(call("--format", "json", "--schedule", "zb-v,gpipe")[1])
    assert len(chosen["partition"]) == {"zb-v": 6, "gpipe": 3}[chosen["schedule"]]


def test_a_partition_is_given_as_a_list_or_a_file(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("--partition", "[4,4,1]")[1] == call("--partition", "4,4,1")[1].replace("on 4,4,1:", "on [4,4,1]:")
    monkeypatch.chdir(folder)
    assert call("--partition", "uniform", "--schedule", "zb-v", "-o", folder / "p.json")[0] == 0
    content = json.loads(call("--partition", "p.json", "--format", "json", "--set", "pipeline.schedule=auto")[1])
    assert (content["schedule"], content["partition"]) == ("zb-v", [2, 2, 2, 1, 1, 1])


def test_json_has_what_else_there_would_be(call: Call) -> None:
    content = json.loads(call("--format", "json")[1])
    assert content["bottleneck"]["stage_ms"] == pytest.approx(content["stages"][0]["forward_ms"] * 3)
    assert {"uniform", "parameters", "compute"} < content["alternatives"].keys()
    assert content["alternatives"]["uniform"]["partition"] == [3, 3, 3]
    assert content["alternatives"]["uniform"]["fits"] is True
    assert len(content["smallest_limits"]) == 3


def test_the_runs_own_partition_is_judged_as_it_runs(call: Call) -> None:
    out = call("--set", "plan.partition=[3,3,3]")[1]
    (own,) = (line for line in out.splitlines() if line.startswith("The run's own"))
    assert own.endswith("ms per step (1f1b, 4 x 2 samples)")


def test_a_partition_by_hand_is_simulated_and_bettered(call: Call) -> None:
    code, out, _ = call("--partition", "1,1,7")
    assert code == 0
    assert "Partition 1,1,7: [1, 1, 7]" in out
    assert "the planner would cut into [4, 3, 2]" in out
    assert "faster" in out
    code, out, _ = call("--partition", "uniform", "--set", "pipeline.recompute_ratio=1")
    assert code == 0
    assert "3 recomputed" in out
    code, out, _ = call("--set", "plan.partition=[5,2,2]")
    assert "The run's own: [5, 2, 2]" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--memory-limit", "100"), "memory_limit 100 bytes (100 B) cannot be kept: the smallest that can is"),
        (("--memory-limit", "much"), "'much' is no size"),
        (("--memory-limit", "1GiB,1GiB"), "memory_limit has 2 entries for 3 ranks"),
        (("--partition", "4,4"), "has 8 blocks in all"),
        (("--partition", "best"), "best: no such file"),
        (("--schedule", "zigzag"), "pipeline.schedule = 'zigzag' is not one of "),
        (("--schedule", "1f1b,zigzag"), "unknown schedule 'zigzag'"),
        (("--microbatches", "some"), "--microbatches 'some' is neither"),
        (("--set", "model.num_layers=5"), "is of a model of 9 blocks, and the run's has 11"),
        (
            ("--set", "model.hidden_size=64"),
            "profile.json: was measured with model.hidden_size = 32, and the run has 64; measure again with "
            "`vpipe profile`",
        ),
        (("--set", "data.sequence_length=32"), "data.sequence_length = 16, and the run has 32"),
        (("--set", "optimizer.name=sgd"), "optimizer.name = 'adamw', and the run has 'sgd'"),
        (("--set", "train.batch_size=32"), "says nothing of 8; profile that size too"),
    ],
)
def test_mistakes_are_told_in_one_line(call: Call, arguments: tuple[str, ...], words: str) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (1, "")
    assert words in err
    assert "Traceback" not in err


def test_without_a_profile_it_measures(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def obtain(run: Any, sizes: Any) -> Profile:
        asked.append((run.num_ranks, sizes))
        return _profile()

    monkeypatch.setattr("vpipe.cli.plan.obtain_profile", obtain)
    assert call(profile=None)[0] == 0
    assert call("--microbatches", "auto", profile=None)[0] == 0
    assert call("--microbatches", "2,8", profile=None)[0] == 0
    assert asked == [(3, (2,)), (3, (1,)), (3, (1, 4))]


def test_the_examples_of_the_documentation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned, by_hand = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(compile(planned, str(DOCUMENT), "exec"), names)
    *explained, best, rate = capsys.readouterr().out.splitlines()
    assert explained[0] == "Plan: 1f1b, 4 x 2 samples, partition [4, 3, 2]"
    assert best.startswith("Plan('1f1b', num_microbatches=4, num_ranks=3, ")
    assert "partition=[4, 3, 2]" in best
    assert float(rate) > 0
    names |= {"chain": build_setup(read_config(folder / "run.yml").config).chain, "world": SimpleNamespace(num_ranks=2)}
    exec(compile(by_hand, str(DOCUMENT), "exec"), names)
    assert "num_microbatches=8" in capsys.readouterr().out


def test_planning_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from vpipe.cli.plan import command; "
        f"command(['{folder / 'run.yml'}', '--profile', '{folder / 'profile.json'}'], standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
