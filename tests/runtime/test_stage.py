"""A stage's forward and backward are those of its blocks in a row, and recompute exactly what they are told to."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import ClassVar

import pytest
import torch
from torch import nn

from vpipe.errors import ModelError
from vpipe.model.chain import Block, Chain, ValueSpec
from vpipe.model.loss import CallableLoss
from vpipe.runtime.stage.key import MicrobatchKey
from vpipe.runtime.stage.stage import Stage

KEY = MicrobatchKey(seed=1, iteration=2, microbatch=0)


class Counted(nn.Module):
    """Linear and dropout, counting its forwards; the mean of what passes is kept as a running buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("mean", torch.zeros(()))
        self.runs = Counter()  # no state that a second run brings back

    def forward(self, value):
        self.runs["forward"] += 1
        with torch.no_grad():
            self.mean.data.mul_(0.9).add_(0.1 * value.mean())
        return self.drop(self.inner(value)).tanh()


def build(num_blocks=4, recomputes=lambda block, microbatch: False, stop=None):
    torch.manual_seed(0)
    chain = Chain.from_modules([Counted() for _ in range(num_blocks)], CallableLoss(nn.functional.mse_loss))
    modules = nn.ModuleList(chain.materialise(block, 0) for block in range(stop or num_blocks))
    stage = Stage(chain, 0, stop or num_blocks, recomputes)
    stage.expect((), [ValueSpec("hidden", (2, 4), torch.float32, True)])
    return stage, modules


def train(stage, modules, serial=0, key=KEY):
    torch.manual_seed(9)
    fields = {"input": torch.randn(2, 4), "target": torch.randn(2, 4)}
    values = stage.forward(serial, modules, {}, fields, key)
    if stage.is_last:
        stage.loss(serial, values, {"loss": 2.0}, 2)
        return values["hidden"].detach(), stage.backward(serial, {})
    return values["hidden"], stage.backward(serial, {"hidden": torch.ones(2, 4)})


@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize("stop", [3, 4])
def test_the_blocks_that_recompute_are_those_that_were_chosen(first, stop):
    stage, modules = build(recomputes=lambda block, microbatch: block >= first, stop=stop)
    train(stage, modules)
    assert [module.runs["forward"] for module in modules] == [2 if block >= first else 1 for block in range(stop)]


def test_microbatches_are_chosen_by_their_index_in_the_batch():
    stage, modules = build(recomputes=lambda block, microbatch: microbatch < 1)
    train(stage, modules, key=MicrobatchKey(1, 0, 1))
    assert [module.runs["forward"] for module in modules] == [1] * 4
    train(stage, modules, key=MicrobatchKey(1, 0, 0))
    assert [module.runs["forward"] for module in modules] == [3] * 4


def test_recomputation_changes_no_bit_dropout_and_buffers_included():
    found = []
    for share in (0, 2, 4):
        stage, modules = build(recomputes=lambda block, microbatch, share=share: block >= 4 - share)
        output, _ = train(stage, modules)
        gradients = [parameter.grad for parameter in modules.parameters()]
        found.append([output, *gradients, *modules.buffers()])
    for other in found[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0], other, strict=True))
    assert found[0][-1] != 0


def test_recomputed_blocks_keep_no_activations():
    plain, recomputing = count_saved(lambda block, microbatch: False), count_saved(lambda block, microbatch: True)
    assert recomputing < plain / 2


def count_saved(recomputes):
    """Count the numbers that a forward keeps for its backward."""
    stage, modules = build(recomputes=recomputes)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stage.forward(0, modules, {}, {"input": torch.randn(2, 4), "target": torch.randn(2, 4)}, KEY)
    return sum(sizes)


def test_dropout_depends_on_seed_iteration_microbatch_and_block():
    keys = [KEY, MicrobatchKey(2, 2, 0), MicrobatchKey(1, 3, 0), MicrobatchKey(1, 2, 1)]
    outputs = [train(*build(), key=key)[0] for key in [*keys, KEY]]
    assert torch.equal(outputs[0], outputs[-1])
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == len(keys)


class OnArray(torch.autograd.Function):
    """Returns a tensor on an array of numpy, whose end can be watched."""

    arrays: ClassVar = []

    @staticmethod
    def forward(ctx, value):
        array = value.numpy().copy()
        OnArray.arrays.append(weakref.ref(array))
        return torch.from_numpy(array)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Outlet(nn.Module):
    def forward(self, value):
        return OnArray.apply(value)


def test_outputs_are_not_kept_for_the_backward():
    """What was sent is freed when it was sent: the backward starts from the graph, not from the tensor."""
    stage, modules = build(stop=3)
    modules[2] = Outlet()
    values = stage.forward(0, modules, {}, {"input": torch.randn(2, 4)}, KEY)
    (array,) = OnArray.arrays
    assert array() is not None
    del values
    gc.collect()
    assert array() is None
    assert stage.num_saved == 1
    stage.backward(0, {"hidden": torch.ones(2, 4)})
    assert stage.num_saved == 0
    assert modules[0].inner.weight.grad is not None


def test_microbatches_go_backward_in_any_order():
    stage, modules = build(stop=3)
    for serial in (4, 7):
        stage.forward(serial, modules, {}, {"input": torch.randn(2, 4)}, KEY)
    assert stage.num_saved == 2
    stage.backward(4, {"hidden": torch.ones(2, 4)})
    stage.backward(7, {"hidden": torch.ones(2, 4)})
    assert stage.num_saved == 0


class Two(nn.Module):
    def forward(self, left, right):
        return left * 2, right.detach() * left.detach()


def test_inputs_get_the_gradients_that_there_are():
    blocks = (
        Block("first", nn.Tanh, ("input",), ("left",)),
        Block("second", nn.Tanh, ("input",), ("right",)),
        Block("two", Two, ("left", "right"), ("left", "product")),
        Block("end", Two, ("left", "product"), ("hidden", "rest")),
    )
    chain = Chain(blocks, ("input", "target"), CallableLoss(nn.functional.mse_loss, ("hidden", "rest")))
    stage = Stage(chain, 2, 3)
    given = [ValueSpec("left", (3,), torch.float32, True), ValueSpec("right", (3,), torch.float32, True)]
    stage.expect(
        given, [ValueSpec("left", (3,), torch.float32, True), ValueSpec("product", (3,), torch.float32, False)]
    )

    def inputs():
        return {"left": torch.ones(3), "right": torch.full((3,), 2.0)}

    outputs = stage.forward(0, nn.ModuleList([Two()]), inputs(), {}, KEY)
    assert not any(value.requires_grad for value in outputs.values())
    assert {name: value.tolist() for name, value in stage.backward(0, {"left": torch.ones(3)}).items()} == {
        "left": [2.0] * 3
    }
    stage.forward(1, nn.ModuleList([Two()]), inputs(), {}, KEY)
    assert stage.backward(1, {}) == {}


@pytest.mark.parametrize(("expected", "text"), [(True, "needs no gradient"), (False, "needs gradient")])
def test_a_gradient_that_inference_did_not_see_is_told(expected, text):
    stage, modules = build(stop=3)
    if expected:
        modules.requires_grad_(False)
    stage.expect((), [ValueSpec("hidden", (2, 4), torch.float32, expected)])
    with pytest.raises(ModelError, match=f"'hidden' {text} where the stage of blocks 0 to 2 ends, unlike when shapes"):
        stage.forward(0, modules, {}, {"input": torch.randn(2, 4)}, KEY)


@pytest.mark.parametrize("swaps", [(), (1,)])
def test_an_input_that_is_changed_in_place_is_told(swaps):
    layers = [nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)]
    chain = Chain.from_modules(layers, CallableLoss(nn.functional.mse_loss))
    stage = Stage(chain, 1, 3, swaps=swaps)
    stage.expect([ValueSpec("hidden", (2, 4), torch.float32, True)], ())
    fields = {"target": torch.zeros(2, 4)}
    with pytest.raises(
        ModelError, match=r"block '1' changes an input in place that comes from the stage before; .*False"
    ):
        stage.forward(0, nn.ModuleList(layers[1:]), {"hidden": torch.ones(2, 4)}, fields, KEY)


def test_a_model_without_trained_weights_has_a_backward_too():
    stage, modules = build()
    modules.requires_grad_(False)
    assert train(stage, modules)[1] == {}


def test_an_evaluation_keeps_nothing():
    stage, modules = build(stop=3)
    output = stage.evaluate(modules, {}, {"input": torch.randn(2, 4)}, KEY)
    assert list(output) == ["hidden"]
    assert not output["hidden"].requires_grad
    assert stage.num_saved == 0
