"""Worlds of one process group do not disturb each other, whoever is in them and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from vpipe.errors import ConfigError
from vpipe.launch.local import launch_local
from vpipe.runtime.comm.world import World


def test_pipelines_in_turn_and_at_once_on_disjoint_ranks(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    launch_local(["worlds_toys:run_worlds", str(tmp_path)], 4, run_directory=tmp_path, environment=environment)
    ranks = [torch.load(tmp_path / f"worlds.{rank}.pt") for rank in range(4)]
    expected = dict(ranks[0][:3])
    assert [result["position"] for _, result in ranks[2][3:]] == [0, 0, 2, 2, 0, 2, 2]
    assert [result["num_ranks"] for _, result in ranks[2][3:]] == [2, 2, 4, 4, 2, 3, 4]
    num_compared = 0
    for process, rank in enumerate(ranks):
        for turn, (name, result) in enumerate(rank):
            assert result["losses"] == expected[name]["losses"], (process, turn, name)
            for key, value in result["state"].items():
                assert torch.equal(value, expected[name]["state"][key]), (process, turn, key)
                num_compared += 1
    assert num_compared > 100


def test_ranks_that_do_not_agree_on_their_order_are_told_and_disturb_nobody(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    launch_local(["worlds_toys:run_orders", str(tmp_path)], 3, run_directory=tmp_path, environment=environment)
    told = [(tmp_path / f"order.{rank}").read_text() for rank in range(3)]
    assert (
        told[0]
        == told[1]
        == (
            "ranks do not agree on the order of their world: rank 0 has [0, 1], rank 1 has [1, 0]; "
            "give the same ranks in the same order on all of them"
        )
    )
    assert told[2] == ""


def test_worlds_without_a_group_of_the_caller_leave_it_together_and_join_again(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    launch_local(["worlds_toys:run_parts", str(tmp_path)], 3, run_directory=tmp_path, environment=environment)
    for turn in range(3):
        assert [(tmp_path / f"part.{turn}.{rank}").read_text() for rank in range(3)] == ["[0]", "[2, 1]", "[2, 1]"]
    assert {(tmp_path / f"part.3.{rank}").read_text() for rank in range(3)} == {"[0, 1, 2]"}


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([0, 1], r"ranks \[0, 1\] are not different ones of 0 to 0"),
        ([0, 0], r"ranks \[0, 0\] are not different ones"),
        ([], r"this process is rank 0, which is not among the ranks \[\] of its world"),
    ],
)
def test_ranks_that_are_none_are_refused(ranks: list[int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        World.join(ranks=ranks)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"timeout_seconds": "x"}, "timeout_seconds is 'x'; give a number of seconds above 0"),
        ({"timeout_seconds": -1}, "timeout_seconds is -1; give a number of seconds above 0"),
        ({"ranks": 3}, "ranks is 3; give a list of torch's ranks"),
        ({"ranks": ["a"]}, r"ranks is \['a'\]; give a list of torch's ranks"),
    ],
)
def test_what_no_world_can_be_made_of_is_told(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        World.join(**arguments)
