"""`vpipe verify` from the inside: every kind of run equal to one process, and what is different found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from train_toys import launch_verifications, write_chain_config, write_config

from vpipe.config import load_config
from vpipe.errors import LaunchError
from vpipe.runtime.comm.world import World
from vpipe.verify.comparison import compare
from vpipe.verify.verify import reference_directory, remove_computed, report_path, run_pipeline, run_reference

PIPEDREAM = "pipeline.schedule=pipedream"
CLIPPED = "optimizer.clip_grad_norm=0.01"
TWO_RANKS = {
    "naive": ["pipeline.schedule=naive", "optimizer.name=adam"],
    "gpipe-always": ["pipeline.schedule=gpipe", "pipeline.recompute=always"],
    "gpipe-except-last": ["pipeline.schedule=gpipe", "pipeline.recompute=except_last", "plan.partition=[1,4]"],
    "1f1b-clipped": [CLIPPED, "plan.partition=parameters"],
    "1f1b-tied": ["model.tie_weights=true", CLIPPED],
    "1f1b-lamb": ["optimizer.name=lamb", "pipeline.recompute_ratio=[0.5,0]"],
    "interleaved": ["pipeline.schedule=interleaved", "pipeline.stages_per_rank=2"],
    "pipedream-clipped": [PIPEDREAM, CLIPPED, "plan.partition=[4,1]", "pipeline.recompute_ratio=1"],
    "pipedream-eager": [PIPEDREAM, "pipeline.stage_to_depth_map=[3,1]", "optimizer.name=sgd"],
    "pipedream-vertical": [PIPEDREAM, "pipeline.vertical_sync=true"],
    "pipedream-macrobatch": [PIPEDREAM, "pipeline.macrobatch=true", "optimizer.name=lamb"],
}
TWO_RANKS |= {
    "1f1b-uneven": ["train.batch_size=10"],
    "zb-h1-last": ["pipeline.schedule=zb-h1", "train.batch_size=23", CLIPPED],
    "pipedream-uneven": [PIPEDREAM, "train.batch_size=7"],
    "pipedream-last": [PIPEDREAM, "train.batch_size=23"],
    "pipedream-macrobatch-last": [PIPEDREAM, "pipeline.macrobatch=true", "train.batch_size=23"],
}
THREE_RANKS = {
    "1f1b-3": ["pipeline.num_ranks=3", CLIPPED],
    "pipedream-3": [PIPEDREAM, "pipeline.num_ranks=3", "plan.partition=[1,3,1]"],
}
CHAINS = {
    "custom": [],
    "custom-unseeded": ["model.entry=chain_toys.py:unseeded", "data.entry=chain_toys.py:unseeded_data"],
    "custom-batch-norm": ["model.options.last=Normed", "pipeline.recompute_ratio=1"],
    "custom-rank-dependent": ["model.options.last=RankDependent", "plan.partition=[3,1]"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, list[str]]]:
    folder = tmp_path_factory.mktemp("verify")
    bert, chain = str(write_config(folder)), str(write_chain_config(folder))
    two = {name: (bert, ["pipeline.num_ranks=2", *overrides]) for name, overrides in TWO_RANKS.items()}
    two |= {name: (chain, overrides) for name, overrides in CHAINS.items()}
    three = {name: (bert, overrides) for name, overrides in THREE_RANKS.items()}
    launch_verifications(folder, 2, two)
    launch_verifications(folder, 3, three)
    return two | three


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def directory_of(runs: dict[str, tuple[str, list[str]]], name: str) -> Path:
    directory = Path(runs[name][0]).parent / name
    reference_directory(directory).mkdir(exist_ok=True)
    return directory


@pytest.mark.parametrize("name", [*TWO_RANKS, *THREE_RANKS, "custom", "custom-unseeded", "custom-batch-norm"])
def test_equal_bit_for_bit(runs: dict[str, tuple[str, list[str]]], name: str) -> None:
    path, overrides = runs[name]
    report = run_reference(load_config(path, overrides), 2, directory_of(runs, name))
    assert report.comparisons == {key: item for key, item in report.comparisons.items() if not item.num_different}
    assert report.equal
    assert report.max_abs_difference == dict.fromkeys(report.comparisons, 0.0)
    assert ("buffers" in report.comparisons) == (name == "custom-batch-norm")
    assert report.synchronous == (not name.startswith("pipedream"))
    # Of 25 samples, batches of 23 leave 2: so many microbatches has the second one.
    updates = 2 if report.synchronous or "macrobatch" in name else 6 if name == "pipedream-last" else 8
    assert report.comparisons["gradients"].num_tensors == updates * report.comparisons["parameters"].num_tensors


def test_a_model_that_behaves_differently_in_the_pipeline_is_found(runs: dict[str, tuple[str, list[str]]]) -> None:
    path, overrides = runs["custom-rank-dependent"]
    directory = directory_of(runs, "custom-rank-dependent")
    report = run_reference(load_config(path, overrides), 2, directory)
    assert not report.equal
    assert all(difference for difference in report.max_abs_difference.values())
    assert report.comparisons["loss"].first_different == "iteration 1: loss"
    assert report.comparisons["gradients"].first_different == "update 1: block.0.linear.weight"
    written = json.loads(report_path(directory).read_text())
    assert written["equal"] is False
    assert set(written["max_abs_difference"]) == {"loss", "gradients", "parameters", "optimizer", "evaluation"}
    remove_computed(directory)
    assert not list(directory.glob("*.pt"))


A, B = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
NAN, ZERO = torch.tensor([float("nan")]), torch.tensor([0.0])


@pytest.mark.parametrize(
    ("found", "expected", "num_different", "largest", "first"),
    [
        ({"a": A}, {"a": A.clone()}, 0, 0.0, None),
        ({"a": A, "b": B}, {"a": A, "b": A}, 1, 0.5, "b"),
        ({"a": NAN}, {"a": NAN.clone()}, 0, 0.0, None),
        ({"a": NAN}, {"a": ZERO}, 1, None, "a"),
        ({"a": -ZERO}, {"a": ZERO}, 1, 0.0, "a"),
        ({"a": A[:1]}, {"a": A}, 1, None, "a"),
        ({"a": A}, {"a": A.double()}, 1, 0.0, "a"),
        ({"a": A}, {"a": A, "b": B}, 1, None, "b (only in one process)"),
        ({"a": A, "b": B}, {"a": A}, 1, None, "b (only in the pipeline)"),
        ({"a": A * 1j}, {"a": A * 2j}, 1, 2.0, "a"),
        ({}, {}, 0, 0.0, None),
    ],
)
def test_comparing(
    found: dict[str, Tensor], expected: dict[str, Tensor], num_different: int, largest: float | None, first: str | None
) -> None:
    comparison = compare(found, expected)
    assert comparison.num_tensors == len(expected)
    assert (comparison.num_different, comparison.max_abs_difference) == (num_different, largest)
    assert comparison.first_different == first


def test_results_that_cannot_be_kept(tmp_path: Path) -> None:
    config = load_config(write_chain_config(tmp_path), ["pipeline.num_ranks=1"])
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "computed.0.pt").mkdir()  # in the way, as a full disk is
    message = r"cannot write what the pipeline computed, \d+ bytes, to .*computed.0.pt; free some space, verify fewer"
    with World.join(timeout_seconds=60) as group, pytest.raises(LaunchError, match=message):
        run_pipeline(config, 1, tmp_path, group)
