"""Wherever weight versions wait, on the device or in host memory, the bits are those of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from equality_cases import CLIP, Case, _run, result_path
from test_equality import assert_bits_of_one_process

from vpipe.launch.local import launch_local
from vpipe.runtime.comm.world import World
from vpipe.runtime.memory import swap
from vpipe.schedule.action import VERSION_MOVES, Action

HERE = Path(__file__).parent

MOVING = {"swap_versions": True}
DEEP = {"depths": [5, 3]}
SWAPPING = {"policies": ["swap"] * 7}
MIXED = {"policies": ["swap", "recompute", "keep", "swap", "swap", "recompute", "swap"]}
AHEAD = {"policies": ["recompute"] * 7, "recompute_ahead": [0, 1]}

CASES = {
    "moving": Case("skipping", (4, 3), "pipedream", 4, MOVING | DEEP | CLIP, "sgd", calls=(3, 1)),
    "moving-vertical": Case("plain", (4, 3), "pipedream", 5, MOVING | DEEP | {"vertical_sync": True}),
    "moving-frozen": Case("frozen", (2, 5), "pipedream", 4, MOVING | DEEP, optimizer="adamw", calls=(1, 2, 1)),
    "moving-ahead": Case("normalised", (3, 4), "pipedream", 4, MOVING | AHEAD | DEEP),
    "moving-mixed": Case("normalised", (3, 4), "pipedream", 4, MOVING | MIXED | DEEP),
    "moving-few": Case("weightless", (3, 4), "pipedream", 2, MOVING | DEEP, calls=(1, 3)),
    "moving-4": Case("plain", (2, 1, 3, 1), "pipedream", 4, MOVING | CLIP, calls=(4, 2)),
    "moving-4-one": Case("skipping", (1, 2, 3, 1), "pipedream", 4, {"swap_versions": [1]}, "sgd", calls=(4, 1)),
    "moving-4-swap": Case("skipping", (1, 2, 3, 1), "pipedream", 4, MOVING | SWAPPING, calls=(4, 1)),
    "moving-4-vertical": Case("normalised", (2, 1, 2, 2), "pipedream", 5, MOVING | {"vertical_sync": True}),
}

MOVED_ON = {"moving-few": {1}, "moving-vertical": {0}, "moving-4-one": {1}, "moving-4-vertical": {0, 3}}
"""Stages whose versions move, where these are not 0 and 1: others have nothing to gain, or too few microbatches."""


def run_cases(arguments: Sequence[str]) -> None:
    """Run all cases of this number of ranks."""
    swap.SMALL_BYTES = 0
    with World.join(timeout_seconds=60, backend="gloo") as group:
        for name, case in CASES.items():
            if case.ranks == group.num_ranks:
                torch.save(_run(case), result_path(Path(arguments[0]), name, group.rank))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    folders: dict[int, Path] = {}

    def find(name: str) -> list[dict[str, Any]]:
        count = CASES[name].ranks
        if count not in folders:
            folders[count] = tmp_path_factory.mktemp(f"ranks{count}")
            command = ["test_version_move_equality:run_cases", str(folders[count])]
            launch_local(command, count, run_directory=folders[count], environment={"PYTHONPATH": str(HERE)})
        return [torch.load(result_path(folders[count], name, rank)) for rank in range(count)]

    return find


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_one_process(results: Callable[[str], list[dict[str, Any]]], name: str) -> None:
    assert_bits_of_one_process(results(name), CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_what_was_asked_for_is_what_is_done(results: Callable[[str], list[dict[str, Any]]], name: str) -> None:
    moving, num_bytes = set(), 0
    for rank in results(name):
        done = [Action.parse(text) for actions in rank["actions"] for text in actions]
        moving |= {action.stage for action in done if action.kind in VERSION_MOVES}
        if rank["moved"] is not None:
            out, back = rank["moved"]
            assert out == back
            num_bytes += out
    assert num_bytes > 0
    assert moving == MOVED_ON.get(name, {0, 1})
