"""The board in one process; between ranks it is part of every test that compares losses."""

from __future__ import annotations

import pytest

from vpipe.errors import ConfigError
from vpipe.runtime.comm.agreement import agree
from vpipe.runtime.comm.board import LossBoard


def test_losses_come_back_in_order():
    board = LossBoard(0, 2, None)
    board.expect()
    board.publish([1.5, 2.0])
    board.publish([0.1, float("inf")])
    assert board.collect() == [1.5, 2.0]
    assert board.collect() == [0.1, float("inf")]
    board.finish()


def test_one_process_agrees_with_itself():
    agree({"plan": object()}, None)


def test_who_has_what_is_told(monkeypatch):
    def gather(everyone, mine, group):
        everyone[:] = [mine, mine | {"partition": "[1, 6]"}, mine, {"seed": "1"}]

    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: 4)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    text = (
        r"ranks do not agree on the partition: rank 0, 2: \[2, 5\]; rank 1: \[1, 6\]; rank 3: nothing. "
        "Start all ranks with the same code, configuration and data"
    )
    with pytest.raises(ConfigError, match=text):
        agree({"seed": 1, "partition": [2, 5]}, object())
