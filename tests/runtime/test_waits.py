"""Ranks that do not call the same, or not as quickly: what each is told, how soon, and that nobody slow is accused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from waits_toys import CASES, LATE_SECONDS, WAYS

from vpipe.errors import LaunchError
from vpipe.launch.local import launch_local

ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).parent)}
TIMEOUT_SECONDS = 60
SAME_CALLS = "Nobody can go on: every rank must make the same calls in the same order"
LATE = ["late_evaluation", "late_step", "late_data", "late_pipeline"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what each case gave both ways, by rank."""
    folder = tmp_path_factory.mktemp("waits")
    launch_local(["waits_toys:run_cases", str(folder)], 2, run_directory=folder, environment=ENVIRONMENT)
    ranks = [torch.load(folder / f"waits.{rank}.pt", weights_only=False) for rank in range(2)]
    return {key: [rank[key] for rank in ranks] for key in ranks[0]}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "late_evaluation",
            "Rank 0 is in evaluate, .* rank 1 has not called evaluate; it is in its own code, .*made its",
        ),
        (
            "late_step",
            "Rank 0 is in step, iteration 4, .* for 1B0 from rank 1: rank 1 has not called step; it is in its",
        ),
        (
            "late_data",
            "Rank 0 is in train, batch 4 of 4, .* rank 1 is in train, batch 4 of 4, waiting for its own data",
        ),
        ("late_pipeline", "Rank 0 is making its Pipeline, .* rank 1 has not made its Pipeline; it is in its own code"),
    ],
)
def test_a_slow_rank_is_named_once_and_nothing_ends(found, name, text, way):
    first, second = found[name, way]
    # On a busy machine there may be words of other waits, which are long, too.
    assert len([line for line in first["told"] if re.match(text, line)]) == 1
    assert not [line for line in second["told"] if "has not" in line]
    assert first["result"] == second["result"]
    assert "Error" not in str(first["result"])
    assert first["seconds"] > LATE_SECONDS - 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "evaluate_against_step",
            "rank 0 is in evaluate, and waits for all ranks to compare .*; rank 1 is in step, iteration 4, and waits "
            f"for 0F0 from rank 0. {SAME_CALLS}",
        ),
        (
            "evaluate_against_clipped_step",
            f"rank 0 is in evaluate, .*; rank 1 is in step, iteration 4, and waits for 0F0 from rank 0. {SAME_CALLS}",
        ),
        (
            "evaluate_against_asynchronous_step",
            f"rank 0 is in evaluate, .*; rank 1 is in step, iteration 4, .* {SAME_CALLS}",
        ),
        (
            "compared_step_against_evaluate",
            f"rank 0 is in step, iteration 1, .*; rank 1 is in evaluate, .*{SAME_CALLS}",
        ),
        ("another_order", f"rank 0 is in evaluate, .*; rank 1 is in train, batch 1 of 2, .*{SAME_CALLS}"),
        (
            "fewer_batches_and_evaluate",
            "rank 0 is in train, batch 4 of 4, and waits for 1B0 from rank 1; rank 1 (is in evaluate|has ended its)",
        ),
    ],
)
def test_ranks_that_wait_for_each_other_end_with_the_same_error(found, name, text, way):
    for rank in found[name, way]:
        assert re.match(f"ExecutionError: {text}", rank["result"])
        assert rank["seconds"] < TIMEOUT_SECONDS / 4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "step_against_close",
            "rank 0 is in step, iteration 4, .*; rank 1 has closed its pipeline. Nobody can go on: ",
        ),
        (
            "fewer_batches",
            "rank 0 is in train, batch 4 of 4, and waits for 1B0 from rank 1; rank 1 has ended its train after 3 "
            "batches. Nobody can go on: give every rank the same number of batches",
        ),
        (
            "fewer_compared_batches",
            "rank 0 is in train, batch 3 of 3, and waits for all ranks .*; rank 1 has ended its train after 2 b",
        ),
    ],
)
def test_a_rank_that_waits_for_one_that_will_not_come_ends(found, name, text, way):
    first, second = found[name, way]
    assert re.match(f"ExecutionError: {text}", first["result"])
    assert first["seconds"] < TIMEOUT_SECONDS / 4
    assert "Error" not in str(second["result"])


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_waits_for_one_that_caught_its_error_is_told_the_error(found, way):
    first, _ = found["caught_error", way]
    assert re.match(
        "PeerLostError: rank 0 is in step, iteration 4, and waits for 1B0 from rank 1; rank 1 stopped: TypeError: ",
        first["result"],
    )
    assert first["seconds"] < TIMEOUT_SECONDS / 4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "counts"), [("fewer_held_out", ("4 more", "10 more")), ("many_fewer_held_out", ("no more", "6 more"))]
)
def test_held_out_batches_of_another_number_are_refused_by_all(found, name, counts, way):
    for rank in found[name, way]:
        assert rank["result"].startswith(
            f"ConfigError: ranks do not agree on the microbatches to evaluate: rank 0: {counts[0]}; rank 1: {counts[1]}"
        )


@pytest.mark.parametrize("way", WAYS)
def test_steps_and_trains_may_be_mixed(found, way):
    first, second = found["steps_and_trains", way]
    assert first["result"] == second["result"]
    assert len(set(first["result"])) == 6


def test_all_cases_are_looked_at(found):
    assert {name for name, _ in found} == set(CASES)


@pytest.mark.parametrize("number", [1, 4])
def test_a_script_that_calls_on_one_rank_only_ends_by_itself(tmp_path, number):
    with pytest.raises(LaunchError, match=rf"rank 0 is in step, iteration {number}.*rank 1 (is closing|has closed)"):
        launch_local(["waits_toys:run_alone", str(number)], 2, run_directory=tmp_path, environment=ENVIRONMENT)
    assert "Traceback" not in (tmp_path / "output.log.0").read_text()


def test_a_chain_of_waits_is_told_to_its_first_cause(tmp_path):
    launch_local(["waits_toys:run_chain"], 3, run_directory=tmp_path, environment=ENVIRONMENT)
    assert re.search(
        r"Rank 0 is in step, iteration 4, waiting for 1 s for 1B0 from rank 1: rank 1 is in step, iteration 4, waiting "
        r"for 2B0 \(for \d+ s\); rank 2 has not called step; it is in its own code, in no call of the pipeline",
        (tmp_path / "output.log.0").read_text(),
    )
