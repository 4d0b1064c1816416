"""Whole runs on 1, 2 and 3 ranks: the same losses, the same evaluation, and the files that a run leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_toys import launch_many, records, train_many, write_config
from transformers import BertForPreTraining

from vpipe.config import load_config
from vpipe.errors import LaunchError
from vpipe.launch.local import launch_local
from vpipe.runtime.comm.world import World
from vpipe.runtime.hooks import Hooks
from vpipe.workload.setup import build_setup, build_training_pipeline

SYNCHRONOUS = {
    "1f1b": [],
    "gpipe": ["pipeline.schedule=gpipe", "pipeline.recompute=except_last"],
    "naive": ["pipeline.schedule=naive"],
}
ASYNCHRONOUS = ["pipeline.schedule=pipedream", "optimizer.clip_grad_norm=null"]
SHORT = ["train.eval_frequency=0", "train.save_model=false"]
SLOW = ["train.iterations=3", "launch.link_latency_ms=100", "launch.link_bandwidth_mb_per_s=10"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run everything that the tests look at, all runs of one number of ranks in one launch."""
    path = write_config(tmp_path_factory.mktemp("runs"))
    one = {f"{name}-1": overrides for name, overrides in SYNCHRONOUS.items() if name == "1f1b"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train_many([str(path), json.dumps(one)])
    torch.set_num_threads(threads)
    launch_many(
        path,
        2,
        {
            **{f"{name}-2": overrides for name, overrides in SYNCHRONOUS.items()},
            "uneven-2": ["plan.partition=[1,4]", "pipeline.recompute_ratio=[1,0.5]"],
            "pipedream-2": ASYNCHRONOUS,
            "last-2": [*SHORT, "train.batch_size=13", "train.iterations=9"],
            "pipedream-last-2": [*SHORT, *ASYNCHRONOUS, "train.batch_size=13", "train.iterations=9"],
            "dropped-2": [*SHORT, "train.batch_size=13", "train.iterations=9", "data.last_batch=drop"],
            "slow-2": [*SHORT, *SLOW],
            **{f"short-{count}": [*SHORT, f"train.iterations={count}"] for count in (1, 2, 3)},
            **{f"async-{count}": [*SHORT, *ASYNCHRONOUS, f"train.iterations={count}"] for count in (1, 2, 3, 9)},
        },
    )
    launch_many(path, 3, {f"{name}-3": overrides for name, overrides in SYNCHRONOUS.items()})
    return path.parent


@pytest.fixture
def one_process() -> Iterator[World]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with World.join(timeout_seconds=60) as world:
        yield world
    torch.set_num_threads(threads)


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    shards = sorted((directory / "model").glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("run", ["1f1b-2", "gpipe-2", "naive-2", "uneven-2", "1f1b-3", "gpipe-3", "naive-3"])
def test_losses_and_weights_do_not_depend_on_schedule_and_number_of_stages(folder: Path, run: str) -> None:
    expected = records(folder / "1f1b-1")
    assert [record["epoch"] for record in expected if "epoch" in record] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert [record["iteration"] for record in expected if "eval_loss" in record] == [4, 8, 11]
    assert records(folder / run) == expected
    one = weights(folder / "1f1b-1")
    many = weights(folder / run)
    assert set(many) == set(one)
    assert all(torch.equal(many[name], one[name]) for name in one)


@pytest.mark.parametrize("run", ["1f1b-3", "pipedream-2"])
def test_the_evaluation_is_that_of_one_process(folder: Path, run: str, one_process: World) -> None:
    overrides = ["pipeline.num_ranks=1", f"model.init_from={folder / run / 'model'}"]
    setup = build_setup(load_config(folder / "run.yml", overrides))
    assert setup.held_out is not None
    assert setup.held_out.num_samples % 5
    pipeline = build_training_pipeline(setup, one_process, Hooks())
    losses = pipeline.evaluate(setup.evaluation_batches(pipeline.fields), setup.config.microbatch_size)
    found = [record for record in records(folder / run) if "eval_loss" in record][-1]
    assert found["eval_loss"] == losses["loss"]
    assert (found["eval_mlm_loss"], found["eval_nsp_loss"]) == (losses["mlm"], losses["nsp"])
    assert summary(folder / run)["eval_loss"] == losses["loss"]


@pytest.mark.usefixtures("one_process")
def test_an_evaluation_of_some_batches_is_of_the_first(folder: Path) -> None:
    setup = build_setup(load_config(folder / "run.yml", ["pipeline.num_ranks=1", "train.eval_batches=2"]))
    sizes = [batch.num_samples for batch in setup.evaluation_batches(("labels",))]
    assert sizes == [5, 5]


@pytest.mark.parametrize("run", ["1f1b-1", "gpipe-3", "pipedream-2"])
def test_transformers_loads_the_model_and_finds_the_reported_loss(folder: Path, run: str) -> None:
    model, info = BertForPreTraining.from_pretrained(folder / run / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    held_out = build_setup(load_config(folder / "run.yml")).held_out
    assert held_out is not None
    fields = held_out.batch(range(held_out.num_samples), list(held_out.fields))
    with torch.no_grad():
        loss = model.eval()(**fields).loss.item()
    assert summary(folder / run)["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_the_files_of_a_run(folder: Path) -> None:
    run = folder / "uneven-2"
    config = load_config(run / "config.yml")
    assert config == load_config(folder / "run.yml", ["plan.partition=[1,4]", "pipeline.recompute_ratio=[1,0.5]"])
    plan = json.loads((run / "plan.json").read_text())
    assert (plan["partition"], plan["recompute_ratio"], plan["depths"]) == ([1, 4], [1.0, 0.5], [1, 0])
    assert [stage["blocks"][0] for stage in plan["stages"]] == ["embedding", "layer.0.attention"]
    saved = {name: tensor for name, tensor in weights(run).items() if name != "cls.predictions.decoder.bias"}  # a copy
    assert sum(stage["parameters"] for stage in plan["stages"]) == sum(tensor.numel() for tensor in saved.values())
    assert plan["cuts"] == [
        {"before_stage": 1, "values": ["hidden"], "forward_bytes": 2 * 32 * 16 * 4, "backward_bytes": 2 * 32 * 16 * 4}
    ]
    reused = load_config(folder / "run.yml", [f"plan.partition={run / 'plan.json'}"])
    assert (reused.plan.partition, reused.recompute_ratios) == ([1, 4], [1.0, 0.5])


def test_the_timeline_shows_measured_actions_of_every_rank(folder: Path) -> None:
    timeline = json.loads((folder / "1f1b-3" / "timeline.json").read_text())
    slices = [row for row in timeline["traceEvents"] if row["ph"] == "X"]
    for rank in range(3):
        names = {row["name"] for row in slices if row["tid"] == rank}
        assert {"F0", "F3", "B0", "B3", "STEP"} <= names
    assert min(row["ts"] for row in slices) == 0
    assert all(row["dur"] >= 0 for row in slices)
    assert {row["args"]["iteration"] for row in slices} == {9, 10, 11}


SHORT_RUNS = ("short-1", "short-2", "short-3", "async-1", "async-2", "async-3", "async-9")


@pytest.mark.parametrize("run", ["1f1b-1", "gpipe-3", "pipedream-2", *SHORT_RUNS])
def test_the_summary_has_all_its_numbers_however_short_the_run(folder: Path, run: str) -> None:
    found = summary(folder / run)
    num_ranks = len(found["ranks"])
    for key in ("samples_per_second", "iteration_ms", "final_loss"):
        assert found[key] > 0
        assert math.isfinite(found[key])
    assert found["samples_per_second"] * found["iteration_ms"] == pytest.approx(8 * 1e3)
    assert 0 <= found["bubble_fraction"] < 1
    assert 0 <= found["communication_share"] <= 1
    for key in ("bytes_sent", "bytes_received", "peak_memory_bytes"):
        assert len(found[key]) == num_ranks
        assert all(value > 0 for value in found[key]) or num_ranks == 1
    assert sum(found["bytes_sent"]) == sum(found["bytes_received"])
    assert found["timeline"]["rows"]
    losses = [record["loss"] for record in records(folder / run) if "loss" in record]
    assert found["final_loss"] == losses[-1]


def test_an_asynchronous_run_is_measured_without_filling_and_draining(folder: Path) -> None:
    assert summary(folder / "async-9")["measured_iterations"] == [5, 7]  # of 25 samples, the 4th and the 8th have 1
    assert summary(folder / "async-9")["weight_versions"] == [2, 1]
    assert summary(folder / "short-3")["measured_iterations"] == [2, 3]
    assert summary(folder / "pipedream-2")["measured_iterations"] == [6, 7]


@pytest.mark.parametrize(
    ("run", "epochs", "num_samples"), [("last-2", 2, 113), ("pipedream-last-2", 2, 113), ("dropped-2", 1, 117)]
)
def test_an_epochs_last_batch_is_trained_or_dropped(folder: Path, run: str, epochs: int, num_samples: int) -> None:
    """Of 25 samples, batches of 13 leave 12."""
    found = [record for record in records(folder / run) if "loss" in record]
    assert [record["epoch"] for record in found] == [index // epochs for index in range(9)]
    assert summary(folder / run)["num_samples"] == num_samples
    assert all(math.isfinite(record["loss"]) for record in found)
    assert "microbatch_size" not in json.loads((folder / run / "plan.json").read_text())


def test_slow_links_change_the_time_and_nothing_else(folder: Path) -> None:
    losses = [[record["loss"] for record in records(folder / run) if "loss" in record] for run in ("slow-2", "short-3")]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
    # There and back: no machine is so quick that a message arrives before it has left.
    assert summary(folder / "slow-2")["iteration_ms"] >= 200


def test_a_run_that_fails_in_its_first_batch_is_the_latest_however_slow_rank_0_is(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    np.load(tmp_path / "set" / "train" / "labels.npy", mmap_mode="r+")[:, 1] = 30000  # only rank 1 reads them
    (tmp_path / "runs" / "slow").mkdir(parents=True)
    with pytest.raises(LaunchError, match=r"^rank 1 stopped: .*labels\.npy is damaged"):
        launch_local(
            ["train_toys:begin_slowly", str(path)],
            2,
            run_directory=tmp_path / "runs" / "slow",
            environment={"PYTHONPATH": str(Path(__file__).parent)},
        )
    assert (tmp_path / "runs" / "latest").resolve() == (tmp_path / "runs" / "slow").resolve()
    assert json.loads((tmp_path / "runs" / "latest" / "plan.json").read_text())["schedule"] == "1f1b"
    for rank in range(2):
        assert "labels.npy is damaged" in (tmp_path / "runs" / "latest" / f"output.log.{rank}").read_text()
