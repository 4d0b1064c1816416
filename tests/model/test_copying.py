"""Copies of modules with all that was put on their parameters."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from torch import nn

from vpipe.errors import ModelError
from vpipe.model.chain import Chain
from vpipe.model.copying import check_memory, copy_module, like_parameter
from vpipe.model.loss import CallableLoss

MSE = CallableLoss(nn.functional.mse_loss)


class Quantised(nn.Parameter):
    """A kind of parameter of somebody's own."""


class Marked(nn.Linear):
    """Marks its bias, and holds one of its own kind."""

    def __init__(self, width=3):
        super().__init__(width, width)
        self.bias.no_decay = True
        self.own = Quantised(torch.ones(width))
        self.own.partner = self.bias
        self.seen = []

    def see(self, gradient):
        self.seen.append(gradient.clone())


def test_attributes_and_kinds_are_kept_and_refer_to_the_copy():
    original = Marked()
    copied = copy_module(original)
    assert copied.bias.no_decay
    assert not hasattr(copied.weight, "no_decay")
    assert type(copied.own) is Quantised
    assert copied.own.partner is copied.bias
    assert copied.bias is not original.bias


def test_hooks_are_kept_and_methods_become_those_of_the_copy():
    original = Marked()
    after = []
    original.weight.register_hook(original.see)
    original.weight.register_hook(lambda gradient: gradient * 0)
    original.bias.register_post_accumulate_grad_hook(lambda parameter: after.append(parameter))
    original.own.requires_grad_(False)
    copied = copy_module(original)
    copied(torch.ones(2, 3)).sum().backward()
    assert len(copied.seen) == 1
    assert not original.seen
    assert not copied.weight.grad.any()
    assert [item is copied.bias for item in after] == [True]
    assert not copied.own.requires_grad


def test_a_frozen_parameter_keeps_hooks_for_when_it_is_trained():
    original = nn.Linear(2, 2)
    original.weight.register_hook(lambda gradient: gradient * 0)
    original.weight.requires_grad_(False)
    copied = copy_module(original)
    assert not copied.weight.requires_grad
    copied.weight.requires_grad_()
    copied(torch.ones(1, 2)).sum().backward()
    assert not copied.weight.grad.any()


def test_what_cannot_be_copied_is_shared():
    original = nn.Linear(2, 2)
    original.weight.stream = iter([1])
    original.weight.lock = (item for item in ())
    copied = copy_module(original)
    assert copied.weight.lock is original.weight.lock


def test_a_copy_of_a_copy_and_materialised_blocks_have_them_too():
    original = Marked()
    original.weight.register_hook(lambda gradient: gradient * 0)
    chain = Chain.from_modules([original], MSE)
    again = copy_module(chain.materialise(0, 0))
    assert again.bias.no_decay
    again(torch.ones(2, 3)).sum().backward()
    assert not again.weight.grad.any()


def test_modules_of_the_meta_device_keep_them():
    with torch.device("meta"):
        original = nn.Linear(2, 2)
    original.bias.no_decay = True
    original.weight.register_hook(lambda gradient: gradient * 0)
    made = Chain.from_modules([original], MSE).materialise(0, 0)
    assert made.bias.no_decay
    made(torch.ones(1, 2)).sum().backward()
    assert not made.weight.grad.any()


def test_shapes_are_inferred_where_a_forward_reads_them():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * self.weight.scale

    layer = Scaled(2, 2)
    layer.weight.scale = 3.0
    chain = Chain.from_modules([layer, nn.Linear(2, 2)], MSE)
    assert chain.infer([1], {"input": torch.ones(4, 2)})[1][0].shape == (4, 2)


def test_a_parameter_of_other_numbers_has_type_and_attributes():
    original = Quantised(torch.ones(2))
    original.mark = "x"
    made = like_parameter(original.data, original)
    assert type(made) is Quantised
    assert made.mark == "x"
    assert made.data_ptr() == original.data_ptr()
    assert made is not original


def test_memory_that_parameters_share_unsaid_is_told():
    table, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = nn.Parameter(table.weight.data)
    with pytest.raises(ModelError, match=r"'0.weight' and '1.weight' share their memory without being one parameter"):
        Chain.from_modules([table, head], MSE)
    head.weight = nn.Parameter(table.weight.data[1:3])
    with pytest.raises(ModelError, match="share their memory"):
        Chain.from_modules([table, head], MSE)
    layer = nn.Linear(2, 2)
    layer.register_buffer("average", layer.weight.data)
    with pytest.raises(ModelError, match=r"'0.average' and '0.weight' share their memory"):
        Chain.from_modules([layer], MSE)


def test_parts_of_one_memory_that_do_not_overlap_are_no_matter():
    flat = torch.ones(8)
    check_memory([("a", nn.Parameter(flat[:4])), ("b", nn.Parameter(flat[4:])), ("c", torch.empty(0))])
    frozen = nn.Parameter(flat, requires_grad=False)
    check_memory([("a", frozen), ("b", flat)])


def test_a_layer_that_was_compiled_in_place_stays_so():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    layer = Doubled(2, 2)
    layer.compile(backend=backend)
    copied = copy_module(layer)
    copied.weight.data.zero_()
    assert torch.equal(copied(torch.ones(1, 2))[0], copied.bias * 2)
    assert len(graphs) == 1


def test_hooks_of_a_weight_that_blocks_share_are_told():
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.weight = one.weight
    one.weight.register_hook(lambda gradient: gradient * 0)
    with pytest.raises(ModelError, match=r"'0.weight' and '1.weight' are one weight with a hook"):
        Chain.from_modules([one, two], MSE)


def test_what_cannot_be_copied_is_named():
    layer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layer[1].lock = threading.Lock()
    with pytest.raises(
        ModelError, match=r"the attribute '1.lock' of a Sequential .* cannot pickle '_thread.lock'.*__deep"
    ):
        copy_module(layer)


def test_hooks_of_other_objects_go_on_telling_these():
    class Tracker:
        def __init__(self):
            self.seen = []

        def on(self, gradient):
            self.seen.append(gradient)

    tracker, store = Tracker(), []
    layer = nn.Linear(2, 2)
    layer.weight.register_hook(tracker.on)
    layer.bias.register_hook(partial(lambda kept, gradient: kept.append(gradient), store))
    layer.weight.tracker = tracker
    layer.weight.group = [layer.bias]
    copied = copy_module(layer)
    copied(torch.ones(1, 2)).sum().backward()
    assert len(tracker.seen) == 1
    assert copied.weight.tracker is tracker
    assert copied.weight.group == [copied.bias]


def test_columns_of_one_tensor_share_no_element():
    flat = torch.randn(6, 12)
    check_memory([("a", nn.Parameter(flat[:, :6])), ("b", nn.Parameter(flat[:, 6:]))])
    with pytest.raises(ModelError, match="share their memory"):
        check_memory([("a", nn.Parameter(flat[:, :7])), ("b", nn.Parameter(flat[:, 6:]))])


def test_a_scripted_module_has_parameters_of_its_own_and_shares_what_it_shared():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, inner = nn.Linear(3, 3), nn.Linear(3, 3)
            inner.weight = self.plain.weight
            inner.bias.requires_grad_(False)
            self.scripted = torch.jit.script(inner)

        def forward(self, x):
            return self.plain(x) + self.scripted(x)

    original = Half()
    copied = copy_module(original)
    assert copied.scripted.weight is copied.plain.weight
    assert [item.requires_grad for item in copied.parameters()] == [True, True, False]
    assert all(item.is_leaf for item in copied.parameters())
    copied(torch.ones(1, 3)).sum().backward()
    assert torch.equal(copied.plain.weight.grad, torch.full((3, 3), 2.0))
    assert original.plain.weight.grad is None
    again = copy_module(copied, {id(copied.scripted.bias): copied.scripted.bias})
    assert again.scripted.bias is copied.scripted.bias
    assert again.scripted.weight is again.plain.weight is not copied.plain.weight
