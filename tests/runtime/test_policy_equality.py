"""Whatever blocks keep, recompute or swap, and whenever, the bits are those of one process that keeps everything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from equality_cases import CLIP, Case, _run, result_path
from test_equality import assert_bits_of_one_process

from vpipe.launch.local import launch_local
from vpipe.runtime.comm.world import World
from vpipe.runtime.memory import swap
from vpipe.schedule.action import Action, Kind

HERE = Path(__file__).parent

KEEP, AGAIN, SWAP = "keep", "recompute", "swap"
SWAPPING = {"policies": [SWAP] * 7}
MIXED = {"policies": [SWAP, AGAIN, KEEP, SWAP, SWAP, AGAIN, SWAP]}
AHEAD = {"policies": [AGAIN] * 7, "recompute_ahead": [0, 1]}
BOTH = {"policies": [AGAIN, SWAP, SWAP, KEEP, SWAP, AGAIN, AGAIN], "recompute_ahead": [0, 1]}
DEEP = {"depths": [5, 3]}

CASES = {
    "ahead-1f1b": Case("skipping", (4, 3), "1f1b", 6, AHEAD | CLIP),
    "ahead-except-last": Case("normalised", (3, 4), "gpipe", 4, AHEAD | {"recompute": "except_last"}, "sgd"),
    "ahead-split": Case("normalised", (3, 4), "zb-h2", 5, AHEAD),
    "ahead-pipedream": Case("normalised", (3, 4), "pipedream", 4, AHEAD),
    "swap-gpipe": Case("skipping", (4, 3), "gpipe", 5, SWAPPING | CLIP),
    "swap-1f1b": Case("normalised", (3, 4), "1f1b", 6, SWAPPING | DEEP),
    "swap-split": Case("plain", (4, 3), "zb-h2", 6, SWAPPING, "sgd"),
    "swap-pipedream": Case("skipping", (4, 3), "pipedream", 4, SWAPPING | DEEP, "sgd"),
    "swap-macrobatch": Case(
        "plain", (3, 4), "pipedream", 4, SWAPPING | {"macrobatch": True, "depths": [3, 2]}, calls=(3, 1)
    ),
    "swap-stages": Case("tied", (2, 1, 2, 2), "looped-bfs", 4, SWAPPING | {"stages_per_rank": 2}, num_ranks=2),
    "swap-nested": Case("nested", (4, 3), "1f1b", 6, SWAPPING | DEEP),
    "both-nested": Case("nested", (3, 4), "pipedream", 4, BOTH | DEEP),
    "mixed-gpipe": Case("tied", (4, 3), "gpipe", 4, MIXED | CLIP),
    "mixed-split": Case("skipping", (4, 3), "zb-h2", 6, MIXED),
    "mixed-pipedream": Case("normalised", (3, 4), "pipedream", 4, MIXED | DEEP),
    "mixed-frozen": Case("frozen", (2, 5), "gpipe", 4, MIXED, optimizer="adamw"),
    "both-1f1b": Case("skipping", (3, 4), "1f1b", 6, BOTH | DEEP),
    "both-split": Case("frozen", (3, 4), "zb-h2", 6, BOTH, optimizer="adamw"),
    "both-pipedream": Case("plain", (4, 3), "pipedream", 4, BOTH | DEEP),
}


def run_cases(arguments: Sequence[str]) -> None:
    """Run all cases in one rank of two."""
    swap.SMALL_BYTES = 0
    with World.join(timeout_seconds=60, backend="gloo") as group:
        for name, case in CASES.items():
            torch.save(_run(case), result_path(Path(arguments[0]), name, group.rank))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    command = ["test_policy_equality:run_cases", str(folder)]
    launch_local(command, 2, run_directory=folder, environment={"PYTHONPATH": str(HERE)})
    return {name: [torch.load(result_path(folder, name, rank)) for rank in range(2)] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_one_process(results, name):
    assert_bits_of_one_process(results[name], CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_what_was_asked_for_is_what_is_done(results, name):
    options = CASES[name].options
    for rank in results[name]:
        done = {Action.parse(text).kind for actions in rank["actions"] for text in actions}
        assert (Kind.R in done) == ("recompute_ahead" in options)
        assert (Kind.OFFLOAD in done) == (Kind.FETCH in done) == (rank["moved"] is not None)
    moved = [rank["moved"] for rank in results[name] if rank["moved"]]
    assert bool(moved) == (SWAP in options["policies"])
    assert all(out == back for out, back in moved)
    assert not moved or sum(out for out, _ in moved) > 0
