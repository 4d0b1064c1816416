"""Two ranks that disagree, go wrong or lose each other: what each of them is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from refusal_toys import CHECKS

from vpipe.errors import LaunchError
from vpipe.launch.local import launch_local

HERE = Path(__file__).parent
ENVIRONMENT = {"PYTHONPATH": str(HERE)}


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    """Return what each check gave, by rank."""
    folder = tmp_path_factory.mktemp("checks")
    launch_local(["refusal_toys:run_checks", str(folder)], 2, run_directory=folder, environment=ENVIRONMENT)
    ranks = [torch.load(folder / f"checks.{rank}.pt", weights_only=False) for rank in range(2)]
    return {name: [rank[name] for rank in ranks] for name in CHECKS}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("other_partition", r"the partition: rank 0: \[4, 3\]; rank 1: \[3, 4\]. Start all ranks with the same code"),
        ("other_seed", "the seed: rank 0: 0; rank 1: 1"),
        ("other_blocks", r"the partition: rank 0: \[3, 4\]; rank 1: \[3, 5\]"),
        ("other_modes", "the parts in evaluation mode: rank 0: none; rank 1: 5.1. Start all"),
        ("other_frozen", "the frozen weights: rank 0: none; rank 1: 5.0.weight, 5.0.bias. Start all"),
        ("other_clipping", r"the clip_grad_norm: rank 0: None; rank 1: 1\.0"),
        ("other_depths", r"the schedule: rank 0: pipedream with 1 microbatches \(\w{16}\); rank 1: pipedream with"),
        ("other_number_of_batches", "the number of batches: rank 0: 2; rank 1: 3"),
        ("other_batch_size", r"the values between stages: rank 0: .*\(2, 9\).*; rank 1: .*\(3, 9\)"),
    ],
)
def test_a_plan_on_which_ranks_disagree_is_refused_by_all(found, name, text):
    for rank in found[name]:
        assert re.match(f"ConfigError: ranks do not agree on {text}", rank)
    assert found[name][0] == found[name][1]


def test_different_batches_are_refused_by_all(found):
    first, second = found["other_batches"]
    assert first == second
    assert first.startswith(
        "ConfigError: rank 0 and rank 1 were given different batches: the field 'target' is not the same. Every rank "
        "needs the same batches in the same order, so draw them with the same seed on all ranks (torch.manual_seed)"
    )


def test_other_numbers_beside_the_tensors_of_a_batch_are_refused_by_all(found):
    first, second = found["other_constants"]
    assert first == second
    assert re.match(
        r"ConfigError: ranks do not agree on the form of the batch: rank 0: .*'scale': 1.0.*rank 1: ", first
    )


def test_batches_that_drift_apart_are_refused_before_long(found):
    assert found["drifting_batches"] == [4, 4]


def test_an_output_of_another_shape_is_refused_and_the_other_rank_does_not_wait_for_ever(found):
    first, second = found["wrong_shape"]
    assert first == (
        "TransportError: 'hidden' was agreed as (2, 6) torch.float32 but is (2, 3) torch.float32; blocks must write "
        "the same shapes and types for every microbatch"
    )
    assert re.match(r"PeerLostError: waited for 2 s for 0F0 from rank 0, which does not answer", second)


@pytest.mark.parametrize("name", ["not_a_number_synchronous", "not_a_number_asynchronous"])
def test_a_loss_that_is_no_number_is_told_to_all_and_the_next_pipeline_works(found, name):
    first, second = found[name]
    assert first == second
    assert re.match(
        r"NonFiniteLossError: the loss became nan at iteration 2 .* broken samples, .* \[[\d.]+, [\d.]+\]", first
    )


def test_copies_of_a_weight_start_and_stay_equal(found):
    assert found["tied_weights"] == [[True] * 3] * 2


@pytest.mark.parametrize(("name", "weight"), [("other_weights", "0.weight"), ("other_buffers", "1.running_mean")])
def test_other_weights_are_refused_by_all(found, name, weight):
    first, second = found[name]
    assert first == second
    assert first.startswith(
        f"ConfigError: rank 0 and rank 1 were given different weights: '{weight}' is not the same. Each rank trains "
        "its part of the model that it was given, so make the same on all of them: draw it with the same seed"
    )


def test_weights_that_nobody_seeded_are_those_of_the_first_rank(found):
    assert found["unseeded_weights"] == [[True, True], [True, False]]


def test_messages_give_the_same_weights_whatever_way_they_take(found):
    expected = {"shared memory": (True, True), "sockets": (False, True), "sockets, by order": (False, True)}
    assert found["ways_of_messages"] == [expected] * 2


def test_a_rank_needs_only_its_own_fields(found):
    (first, loss), (second, same) = found["own_fields_only"]
    assert (first, second) == (("input",), ("target",))
    assert loss == same


def test_batches_drawn_on_the_way_are_the_same_on_all_ranks(found):
    first, second = found["drawn_batches"]
    assert first == second
    assert len(set(first)) == 4


def test_a_script_that_joined_by_its_pipeline_tells_the_others_why_it_stops(tmp_path):
    with pytest.raises(LaunchError, match="rank 1 stopped: shard 7 is truncated"):
        launch_local(["refusal_toys:run_alone"], 2, run_directory=tmp_path, environment=ENVIRONMENT)
    assert "rank 1 stopped: shard 7 is truncated" in (tmp_path / "output.log.0").read_text()
