"""Both ways into a graph give the same gradients; only one of them lets go of the values."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from vpipe.runtime.stage.entry import enter_as_leaves, enter_through_nodes

NAMES = frozenset({"left", "unused"})


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {"left": torch.randn(3, 4), "mask": torch.ones(3, 4), "unused": torch.randn(2)}


@pytest.mark.parametrize("backward", [lambda value: value.sum(), lambda value: (value.t() @ value).square().sum()])
def test_gradients_are_the_same_in_bits_and_layout(backward) -> None:
    found = []
    for enter in (enter_as_leaves, enter_through_nodes):
        entrance = enter(inputs(), NAMES)
        values = entrance.values
        backward(values["left"] * values["mask"] + values["left"].sin()).backward()
        found.append(entrance.gradients())
    assert found[0].keys() == found[1].keys() == {"left"}
    assert torch.equal(found[0]["left"], found[1]["left"])
    assert found[0]["left"].stride() == found[1]["left"].stride()


def test_a_gradient_lies_as_the_backward_made_it() -> None:
    for enter in (enter_as_leaves, enter_through_nodes):
        entrance = enter(inputs(), NAMES)
        entrance.values["left"].T.contiguous().square().sum().backward()
        assert entrance.gradients()["left"].stride() == (1, 3)


def test_what_entered_goes_without_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    try:
        for enter in (enter_as_leaves, enter_through_nodes):
            given = inputs()
            memory = weakref.ref(given["left"])
            entrance = enter(given, NAMES)
            entrance.values["left"].sum().backward()
            del given, entrance
            assert memory() is None
    finally:
        gc.enable()


def test_what_needs_no_gradient_gets_none() -> None:
    for enter in (enter_as_leaves, enter_through_nodes):
        values = enter(inputs(), NAMES).values
        assert [name for name, value in values.items() if value.requires_grad] == ["left", "unused"]


@pytest.mark.parametrize(("enter", "holds"), [(enter_as_leaves, True), (enter_through_nodes, False)])
def test_only_leaves_are_held_by_the_graph(enter, holds) -> None:
    array = np.zeros(3, dtype=np.float32)
    memory = weakref.ref(array)
    entrance = enter({"left": torch.from_numpy(array)}, frozenset({"left"}))
    output = entrance.values["left"] + 1
    assert bool(list(entrance.held())) == holds
    entrance.values = {}
    del array
    gc.collect()
    assert (memory() is not None) == holds
    output.sum().backward()
    assert torch.equal(entrance.gradients()["left"], torch.ones(3))
