"""A second run puts back what the first left out: all of it, nothing else, once, and when it is asked to."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vpipe.errors import ModelError
from vpipe.runtime.stage.recompute import Recomputation
from vpipe.runtime.stage.state import ChangingState


class Counted(nn.Module):
    """Two linear layers, and how often they ran."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.runs: Counter[str] = Counter()  # no state that a second run brings back

    def forward(self, value: Tensor) -> Tensor:
        self.runs["first"] += 1
        hidden = self.first(value).tanh()
        self.runs["last"] += 1
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
    assert module.runs["first"] == 1
    output.sum().backward()
    assert module.runs["first"] == 2


def test_it_runs_again_when_told_and_not_once_more_in_the_backward() -> None:
    module = Counted()
    again, value = prepare(module)
    output = again.run(value)
    again.fill()
    again.fill()
    assert module.runs["first"] == 2
    output.sum().backward()
    assert module.runs["first"] == 2


class ForScript(nn.Module):
    """What a script is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, value: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(value)))


def test_a_scripted_module_runs_again() -> None:
    torch.manual_seed(2)
    plain = ForScript()
    module = torch.jit.script(ForScript())
    module.load_state_dict(plain.state_dict())
    _, value = prepare(plain)
    for _ in range(3):  # torch rewrites a script when it has seen it run
        module(value).sum().backward()
    module.zero_grad()
    again, other = prepare(module)
    _, value = prepare(plain)
    again.run(other).square().sum().backward()
    plain(value).square().sum().backward()
    for mine, theirs in zip(gradients(module, other), gradients(plain, value), strict=True):
        assert torch.equal(mine, theirs)


class ForOtherScript(ForScript):
    """Another script, of which torch has seen nothing yet."""

    def forward(self, value: Tensor) -> Tensor:
        return self.last(torch.sigmoid(self.first(value)))


def test_a_script_that_torch_rewrites_between_the_runs_is_told_in_our_words() -> None:
    module = torch.jit.script(ForOtherScript())
    again, value = prepare(module)
    output = again.run(value)
    with pytest.raises(ModelError, match="when it was computed again; a block that recomputes"):
        output.sum().backward()


def test_an_error_of_the_second_run_is_told() -> None:
    class Fails(Counted):
        def forward(self, value: Tensor) -> Tensor:
            if self.runs["first"]:
                raise RuntimeError("no more")
            return super().forward(value)

    module = Fails()
    again, value = prepare(module)
    output = again.run(value)
    with pytest.raises(RuntimeError, match="no more"):
        output.sum().backward()


def test_what_comes_after_the_last_saved_tensor_is_not_run_again() -> None:
    class Tail(Counted):
        def forward(self, value: Tensor) -> Tensor:
            result = super().forward(value)
            self.runs["last"] += 10
            return result

    module = Tail()
    again, value = prepare(module)
    again.run(value).sum().backward()
    # The output of the last layer is saved by nobody: its second run ends before the layer computes.
    assert module.runs["last"] == 11 + 1


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
    assert module.runs["first"] == 1


def test_without_anything_to_train_there_is_nothing_to_do() -> None:
    module = Counted().requires_grad_(False)
    again, value = prepare(module)
    again.run(value.detach())
    assert not again.is_needed
    again.fill()
    assert module.runs["first"] == 1


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


class Averaging(nn.Module):
    """State of every kind that a forward reads and writes: buffers, plain tensors and numbers, what comes later."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.kind = kind
        self.register_buffer("mean", torch.zeros(2000 if kind == "large" else 1))
        self.register_buffer("same", self.mean)
        self.attribute = torch.zeros(1)
        self.number = 0

    def _next(self, value: Tensor) -> Tensor:
        if self.kind in ("buffer", "large"):
            return self.mean.mul_(0.5).add_(value.detach().mean()).clone()
        if self.kind == "reassigned":
            self.mean = self.mean * 0.5 + value.detach().mean()
            return self.mean
        if self.kind == "attribute":
            return self.attribute.mul_(0.5).add_(value.detach().mean()).clone()
        if self.kind == "made later":
            self.later = getattr(self, "later", torch.zeros(1)) * 0.5 + value.detach().mean()
            return self.later
        if self.kind == "number":
            self.number += 1
            return torch.tensor(float(self.number))
        self.counted = getattr(self, "counted", 0) + 1
        return torch.tensor(float(self.counted))

    def forward(self, value: Tensor) -> Tensor:
        scale = self._next(value).sum()
        return (self.inner(value) * scale).tanh()


@pytest.mark.parametrize("kind", ["buffer", "large", "reassigned", "attribute", "made later", "number", "counted"])
def test_the_second_run_meets_the_state_that_the_first_one_met(kind: str) -> None:
    found = []
    for recomputes in (False, True):
        torch.manual_seed(3)
        module, state, outputs = Averaging(kind), ChangingState("middle"), []
        values = [torch.randn(5, 4, requires_grad=True) for _ in range(4)]
        for value in values:
            again = Recomputation("middle", module, module, state)
            outputs.append(again.run(value) if recomputes else module(value))
        for output in outputs:
            output.square().sum().backward()
        held = [module.mean, module.attribute, getattr(module, "later", torch.zeros(1))]
        numbers = torch.tensor([module.number, getattr(module, "counted", 0)])
        found.append([*gradients(module.inner, values[0]), *held, numbers, *(value.grad for value in values)])
        assert module.same is module.mean or kind == "reassigned"
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def test_only_state_that_changes_is_kept() -> None:
    module, state = Averaging("large"), ChangingState("middle")
    module.register_buffer("mask", torch.ones(3000))
    for _ in range(2):
        again = Recomputation("middle", module, module, state)
        again.run(torch.randn(5, 4, requires_grad=True))
    assert sorted(tensor.numel() for tensor in again.tensors()) == [
        20,
        2000,
        2000,
    ]  # one has two names


def test_a_large_tensor_that_changes_late_is_told() -> None:
    class Late(Averaging):
        def forward(self, value: Tensor) -> Tensor:
            self.number += 1
            if self.number == 3:
                self.mean.add_(1)
            return self.inner(value).tanh()

    module, state = Late("large"), ChangingState("middle")
    for _ in range(2):
        Recomputation("middle", module, module, state).run(torch.randn(5, 4, requires_grad=True))
    with pytest.raises(ModelError, match="block 'middle' changed 'mean' in this forward and in none before"):
        Recomputation("middle", module, module, state).run(torch.randn(5, 4, requires_grad=True))


@pytest.mark.parametrize("twice", [False, True])
def test_a_forward_with_a_backward_of_its_own_is_computed_again(twice: bool) -> None:
    class Saliency(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 4))

        def forward(self, value: Tensor) -> Tensor:
            probe = value.detach().requires_grad_()
            before = self.inner(value)
            (slope,) = torch.autograd.grad(self.inner(probe).square().sum(), probe, create_graph=twice)
            return before + self.inner(value) * slope + torch.rand(4)

    found = []
    for recomputes in (False, True):
        torch.manual_seed(3)
        module = Saliency()
        again, value = prepare(module, lambda value, module=module: torch.manual_seed(4) and module(value))
        output = again.run(value) if recomputes else (torch.manual_seed(4), module(value))[1]
        if recomputes:
            assert all(place.tensor is None for place in again._alive())
        output.square().sum().backward()
        found.append([output, *gradients(module, value)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def test_what_torch_cannot_tell_cannot_be_computed_again() -> None:
    module = nn.Linear(4, 4)
    again, value = prepare(module, lambda value: module(value) + torch.func.grad(lambda x: x.square().sum())(value))
    with pytest.raises(ModelError, match=r"block 'middle' uses a transform of torch\.func.*cannot be computed again"):
        again.run(value)
