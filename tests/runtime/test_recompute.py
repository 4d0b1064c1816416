"""A second run puts back what the first left out: all of it, nothing else, once, and when it is asked to."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vpipe.errors import ModelError
from vpipe.runtime.stage.recompute import Recomputation


class Counted(nn.Module):
    """Two linear layers, and how often they ran."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.num_first = self.num_last = 0

    def forward(self, value: Tensor) -> Tensor:
        self.num_first += 1
        hidden = self.first(value).tanh()
        self.num_last += 1
        return self.last(hidden)


def prepare(module: nn.Module, call: Callable[..., Any] | None = None) -> tuple[Recomputation, Tensor]:
    torch.manual_seed(1)
    return Recomputation("middle", module, call or module), torch.randn(5, 4, requires_grad=True)


def gradients(module: nn.Module, value: Tensor) -> list[Tensor]:
    found = [value.grad, *(parameter.grad for parameter in module.parameters())]
    assert all(item is not None for item in found)
    return [item for item in found if item is not None]


def test_gradients_have_the_same_bits() -> None:
    plain = Counted()
    _, value = prepare(plain)
    plain(value).square().sum().backward()
    module = Counted()
    again, other = prepare(module)
    again.run(other).square().sum().backward()
    for mine, theirs in zip(gradients(module, other), gradients(plain, value), strict=True):
        assert torch.equal(mine, theirs)


def test_it_runs_again_when_the_backward_asks_and_only_then() -> None:
    module = Counted()
    again, value = prepare(module)
    output = again.run(value)
    assert module.num_first == 1
    output.sum().backward()
    assert module.num_first == 2


def test_it_runs_again_when_told_and_not_once_more_in_the_backward() -> None:
    module = Counted()
    again, value = prepare(module)
    output = again.run(value)
    again.fill()
    again.fill()
    assert module.num_first == 2
    output.sum().backward()
    assert module.num_first == 2


def test_what_comes_after_the_last_saved_tensor_is_not_run_again() -> None:
    class Tail(Counted):
        def forward(self, value: Tensor) -> Tensor:
            result = super().forward(value)
            self.num_last += 10
            return result

    module = Tail()
    again, value = prepare(module)
    again.run(value).sum().backward()
    # The output of the last layer is saved by nobody: its second run ends before the layer computes.
    assert module.num_last == 11 + 1


def test_between_the_runs_only_the_inputs_are_held() -> None:
    module = Counted()
    again, value = prepare(module)
    output = again.run(value)
    assert [tensor.data_ptr() for tensor in again.tensors()] == [value.data_ptr()]
    again.fill()
    held = {tensor.untyped_storage().data_ptr() for tensor in again.tensors()}
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    assert len(held - weights) == 2  # the input, and the tanh
    output.sum().backward()
    assert list(again.tensors()) == []


def test_tensors_are_freed_node_by_node_as_the_backward_goes() -> None:
    module = Counted()
    again, value = prepare(module)
    output = again.run(value)
    again.fill()
    alive: list[int] = []
    hidden = [tensor for tensor in again.tensors() if tensor.shape == (5, 6)]
    watched = [weakref.ref(tensor) for tensor in hidden]
    del hidden
    value.register_hook(lambda gradient: alive.append(sum(item() is not None for item in watched)))
    output.sum().backward()
    assert watched
    assert alive == [0]


def test_what_is_never_used_is_never_run_again_and_leaves_nothing() -> None:
    module = Counted()
    again, value = prepare(module)
    output = again.run(value)
    reference = weakref.ref(again)
    del again, output
    gc.collect()
    assert reference() is None
    assert module.num_first == 1


def test_without_anything_to_train_there_is_nothing_to_do() -> None:
    module = Counted().requires_grad_(False)
    again, value = prepare(module)
    again.run(value.detach())
    assert not again.is_needed
    again.fill()
    assert module.num_first == 1


def test_what_follows_the_block_is_computed_again_with_it() -> None:
    module = Counted()
    again, value = prepare(module)
    runs = []

    def loss(result: Tensor) -> Tensor:
        runs.append(result)
        return result.exp().sum()

    total = again.go_on(loss, again.run(value))
    runs.clear()
    gc.collect()
    assert [tensor.shape for tensor in again.tensors()] == [(5, 4)]
    total.backward()
    assert len(runs) == 1
    plain = Counted()
    _, other = prepare(plain)
    plain(other).exp().sum().backward()
    for mine, theirs in zip(gradients(module, value), gradients(plain, other), strict=True):
        assert torch.equal(mine, theirs)


def test_running_statistics_see_a_microbatch_once() -> None:
    plain, module = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    again, value = prepare(module)
    plain(value)
    output = again.run(value)
    again.fill()
    output.sum().backward()
    for mine, theirs in zip(module.buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_block_may_recompute_parts_of_its_own() -> None:
    class Inner(Counted):
        def forward(self, value: Tensor) -> Tensor:
            return checkpoint(super().forward, value, use_reentrant=False)

    plain, module = Counted(), Inner()
    again, value = prepare(module)
    _, other = prepare(plain)
    again.run(value).square().sum().backward()
    plain(other).square().sum().backward()
    for mine, theirs in zip(gradients(module, value), gradients(plain, other), strict=True):
        assert torch.equal(mine, theirs)


class Fickle(nn.Module):
    """Does something else every time."""

    def __init__(self, widths: list[int], depths: list[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, max(widths)))
        self.widths, self.depths = list(widths), list(depths)

    def forward(self, value: Tensor) -> Tensor:
        result = value @ self.weight[:, : self.widths.pop(0)]
        for _ in range(self.depths.pop(0)):
            result = result.sigmoid()
        return result


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (Fickle([3, 2], [1, 1]), r"block 'middle' saved a tensor of \(4, 3\) torch.float32, and of \(4, 2\)"),
        (Fickle([3, 3], [2, 1]), r"block 'middle' saved 3 tensors when it was computed again and 4 before"),
    ],
)
def test_a_second_run_that_differs_is_an_error(module: Fickle, text: str) -> None:
    again, value = prepare(module)
    output = again.run(value)
    with pytest.raises(ModelError, match=text + r".*let it keep its activations"):
        output.sum().backward()


def test_an_input_that_was_changed_since_is_an_error() -> None:
    again, value = prepare(Counted())
    inner = value * 1
    output = again.run(inner)
    inner.mul_(2)
    with pytest.raises(ModelError, match="an input of block 'middle' was changed in place"):
        output.sum().backward()
