"""Blocks that sleep."""

import time

import pytest
import torch
from torch.autograd import gradcheck

from vpipe.errors import ModelError
from vpipe.model.chain import call_block
from vpipe.model.emulated import EmulatedBlock, build_emulated_chain


@pytest.fixture
def naps(monkeypatch):
    """Collect the seconds that blocks would have slept."""
    slept: list[float] = []
    monkeypatch.setattr("vpipe.model.emulated.time.sleep", slept.append)
    return slept


def test_forward_and_backward_take_their_time():
    block, value = EmulatedBlock(20, 40, 8), torch.rand(2, 8, requires_grad=True)
    start = time.perf_counter()
    output = block(value)
    middle = time.perf_counter()
    output.sum().backward()
    assert middle - start >= 0.020
    assert time.perf_counter() - middle >= 0.040


def test_a_pass_sleeps_once_each_way(naps):
    value = torch.rand(2, 3, 8)
    output = EmulatedBlock(20, 40, 8)(value)
    assert output.shape == value.shape
    output.sum().backward()
    assert naps == [0.02, 0.04]


def test_nothing_sleeps_without_a_backward_or_on_the_meta_device_or_for_no_time(naps):
    with torch.no_grad():
        EmulatedBlock(20, 40, 8)(torch.rand(2, 8))
    assert naps == [0.02]
    with torch.device("meta"):
        EmulatedBlock(20, 40, 8)(torch.rand(2, 8)).sum().backward()
    EmulatedBlock(0, 0, 8)(torch.rand(2, 8)).sum().backward()
    assert naps == [0.02]


def test_gradients_are_right(naps):
    block = EmulatedBlock(1, 1, 3).double()
    value = torch.rand(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda value, scale: torch.func.functional_call(block, {"scale": scale}, value), (value, block.scale)
    )


def test_a_weight_that_changed_after_its_forward_is_noticed(naps):
    block = EmulatedBlock(1, 1, 3)
    output = block(torch.rand(2, 3))
    with torch.no_grad():
        block.scale.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_chain_of_them_is_cut_and_trained_like_any_other(naps):
    chain = build_emulated_chain(3, 10, [20, 30, 40], 8)
    fields = {"input": torch.rand(4, 8), "target": torch.rand(4, 8)}
    assert chain.infer([1, 2], fields)[2][0].shape == (4, 8)
    assert naps == []
    values = dict(fields)
    for index, block in enumerate(chain.blocks):
        values |= call_block(block, chain.materialise(index, seed=0), values)
    chain.loss(values, chain.loss.count(fields, 4), 4)["loss"].backward()
    assert naps == [0.01, 0.01, 0.01, 0.04, 0.03, 0.02]
    assert chain.count_parameters() == (8, 8, 8)
    assert not torch.equal(chain.materialise(0, 0).scale, chain.materialise(1, 0).scale)


def test_times_that_make_no_sense_are_refused():
    with pytest.raises(
        ModelError, match="backward_ms has 2 times for 3 blocks; give one number, or one for each block"
    ):
        build_emulated_chain(3, 1, [1, 2], 8)
    with pytest.raises(ModelError, match="got forward_ms=-1, backward_ms=1, width=8"):
        EmulatedBlock(-1, 1, 8)
