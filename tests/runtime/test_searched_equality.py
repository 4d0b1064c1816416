"""A searched schedule has the bits of one process, whatever costs and memory it was searched for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from equality_cases import CLIP, Case, _run, result_path
from test_equality import assert_bits_of_one_process

from vpipe.launch.local import launch_local
from vpipe.runtime.comm.world import World
from vpipe.schedule.passes.lower import lower
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.schedule import uses_split_backward

HERE = Path(__file__).parent
TIMES = {"forward": [1.0, 1.6], "weight_grad": [0.7, 1.2]}

CASES = {
    "default": Case("skipping", (4, 3), "searched", 6, {"stages_per_rank": 1, "recompute_ratio": 0.5}),
    "tight": Case(
        "normalised", (3, 4), "searched", 5, CLIP | {"stages_per_rank": 1, "max_in_flight": 1.5, "rank_times": TIMES}
    ),
    "v": Case(
        "tied", (2, 1, 2, 2), "searched", 4, {"max_in_flight": [2, 1.5], "rank_times": TIMES}, "sgd", num_ranks=2
    ),
}


def run_cases(arguments: Sequence[str]) -> None:
    """Run all cases in one rank of two."""
    with World.join(timeout_seconds=60, backend="gloo") as group:
        for name, case in CASES.items():
            torch.save(_run(case), result_path(Path(arguments[0]), name, group.rank))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched")
    command = ["test_searched_equality:run_cases", str(folder)]
    launch_local(command, 2, run_directory=folder, environment={"PYTHONPATH": str(HERE)})
    return {name: [torch.load(result_path(folder, name, rank)) for rank in range(2)] for name in CASES}


def schedule(case: Case):
    options = {key: case.options[key] for key in ("stages_per_rank", "max_in_flight") if key in case.options}
    return build_schedule("searched", 2, case.num_microbatches, **options, **case.options.get("rank_times", {}))


@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_one_process(results, name):
    assert_bits_of_one_process(results[name], CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_ranks_do_what_was_found(results, name):
    found = schedule(CASES[name])
    assert uses_split_backward(found)
    for number, rank in enumerate(results[name]):
        for actions in rank["actions"]:
            expected = list(map(str, lower(found)[number]))
            assert actions == expected * (len(actions) // len(expected))
