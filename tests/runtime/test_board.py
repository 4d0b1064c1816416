"""The board in one process; between ranks it is part of every test that compares losses."""

from __future__ import annotations

import pytest

from vpipe.errors import ConfigError
from vpipe.runtime.comm.agreement import agree
from vpipe.runtime.comm.board import LossBoard
from vpipe.runtime.comm.world import World


def test_losses_come_back_in_order():
    with World.join() as world:
        board = LossBoard(0, 2, world)
        board.expect()
        board.publish([1.5, 2.0])
        board.publish([0.1, float("inf")])
        assert board.collect() == [1.5, 2.0]
        assert board.collect() == [0.1, float("inf")]
        board.finish()


def test_one_process_agrees_with_itself():
    with World.join() as world:
        agree({"plan": object()}, world)


class Others:
    """A world in which ranks 1 and 3 are of another opinion."""

    def gather(self, mine, what):
        return [mine, mine | {"partition": "[1, 6]"}, mine, {"seed": "1"}]


def test_who_has_what_is_told():
    text = (
        r"ranks do not agree on the partition: rank 0, 2: \[2, 5\]; rank 1: \[1, 6\]; rank 3: nothing. "
        "Start all ranks with the same code, configuration and data"
    )
    with pytest.raises(ConfigError, match=text):
        agree({"seed": 1, "partition": [2, 5]}, Others())
