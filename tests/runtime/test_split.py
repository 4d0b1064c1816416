"""The two halves of a backward are a backward: same bits, nothing computed twice, and less is held in between."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from flat_pipeline import flat_pipeline
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config

from vpipe.model.families.gpt import build_gpt_chain
from vpipe.runtime.stage.split import Deferred, DeferWeightGradients, run_deferred, tell_split


def layer():
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)


def gradients(module, hidden, deferred=None, recompute=False):
    leaf = hidden.clone().requires_grad_()

    def run(value):
        torch.manual_seed(1)
        if deferred is None:
            return module(value)
        with DeferWeightGradients(deferred):
            return module(value)

    output = checkpoint(run, leaf, use_reentrant=False) if recompute else run(leaf)
    with nullcontext() if deferred is None else deferred.collecting():
        output.square().mean().backward()
    return leaf.grad


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_the_halves_give_the_bits_of_a_full_backward(num_samples, recompute):
    full, split = layer(), layer()
    for round_ in range(2):  # the second one adds to gradients that are there
        hidden = torch.randn(num_samples, 8, 32, generator=torch.Generator().manual_seed(round_))
        deferred = Deferred()
        expected = gradients(full, hidden, recompute=recompute)
        found = gradients(split, hidden, deferred, recompute)
        assert len(deferred) == 2  # the feed-forward; attention is one function of torch
        run_deferred(deferred)
        assert not deferred
        assert torch.equal(found, expected)
        for (name, own), other in zip(split.named_parameters(), full.parameters(), strict=True):
            assert torch.equal(own.grad, other.grad), name


def test_what_waits_for_the_second_half_does_not_keep_the_input():
    module, deferred = layer(), Deferred()
    leaf = torch.randn(1, 8, 32, requires_grad=True)
    with DeferWeightGradients(deferred):
        output = module(leaf)
    with deferred.collecting():
        output.sum().backward()
    reference = weakref.ref(leaf)
    del leaf, output
    assert deferred
    assert reference() is None


def test_weights_of_linear_layers_have_no_gradient_before_the_second_half():
    module, deferred = layer(), Deferred()
    gradients(module, torch.randn(1, 8, 32), deferred)
    late = {name for name, item in module.named_parameters() if item.grad is None}
    assert late == {"linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"}


def test_what_only_the_first_half_needs_is_freed_with_it():
    module = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    alive, deferred = [], Deferred()

    class Watched:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.append(1)

        def __del__(self):
            alive.pop()

    with torch.autograd.graph.saved_tensors_hooks(Watched, lambda kept: kept.tensor), DeferWeightGradients(deferred):
        output = module(torch.randn(2, 4, requires_grad=True))
    assert len(alive) == 5  # of each linear layer input and weight, and the input of the activation
    with deferred.collecting():
        output.sum().backward()
    del output
    assert not alive
    run_deferred(deferred)
    assert all(parameter.grad is not None for parameter in module.parameters())


def gpt_block(index):
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=32, n_layer=1, n_head=4)
    return build_gpt_chain(config, tie_weights=False).materialise(index, 3, torch.device("cpu"))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 1, 32), (2, 8, 32)])
@pytest.mark.parametrize("block", [1, 2])
def test_the_layers_of_gpt2_are_split_too(block, shape, recompute):
    full, split = gpt_block(block), gpt_block(block)
    for round_ in range(2):
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(round_))
        deferred = Deferred()
        expected = gradients(full, hidden, recompute=recompute)
        assert torch.equal(gradients(split, hidden, deferred, recompute), expected)
        assert len(deferred) == 2
        early = {name for name, item in split.named_parameters() if item.grad is not None}
        assert round_ or early == {name for name, _ in split.named_parameters() if name.startswith("ln_")}
        run_deferred(deferred)
        for (name, own), other in zip(split.named_parameters(), full.parameters(), strict=True):
            assert torch.equal(own.grad, other.grad), name


def test_products_that_are_no_layers_are_left_to_autograd():
    weight, bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
    rows, deferred = torch.randn(2, 3), Deferred()
    with DeferWeightGradients(deferred):
        results = [
            torch.addmm(bias, rows, weight, alpha=2),
            torch.addmm(bias * 1, rows, weight),
            torch.addmm(nn.Parameter(torch.zeros(2, 4)), rows, weight),
            torch.addmm(bias, rows, weight * 1),
            torch.addmm(bias[:3], rows, nn.Parameter(torch.randn(3, 3)).t()),
        ]
        sum(result.sum() for result in results).backward()
    assert not deferred
    assert weight.grad is not None


@pytest.mark.parametrize("by_columns", [False, True])
def test_the_layout_of_the_input_changes_no_bit(by_columns):
    found = []
    for deferred in (None, Deferred()):
        torch.manual_seed(2)
        weight, bias = nn.Parameter(torch.randn(31, 45)), nn.Parameter(torch.randn(45))
        leaf = torch.randn(31, 57, requires_grad=True) if by_columns else torch.randn(57, 31, requires_grad=True)
        with nullcontext() if deferred is None else DeferWeightGradients(deferred):
            output = torch.addmm(bias, leaf.t() if by_columns else leaf, weight)
        with nullcontext() if deferred is None else deferred.collecting():
            output.square().sum().backward()
        assert deferred is None or (weight.grad is None and len(deferred) == 1)
        run_deferred(deferred or [])
        found.append([leaf.grad, weight.grad, bias.grad])
    assert all(map(torch.equal, *found))


class Reused(nn.Module):
    """One linear layer twice, and a table that is an embedding and a linear layer at once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.once = nn.Linear(6, 6)
        self.table = nn.Parameter(torch.randn(5, 6))

    def forward(self, value):
        twice = self.inner(self.inner(value).tanh())
        words = nn.functional.embedding(torch.tensor([0, 3, 3]), self.table)
        return nn.functional.linear(self.once(twice + words), weight=self.table)


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_that_are_used_twice_have_the_bits_of_a_full_backward_too(recompute):
    torch.manual_seed(0)
    full = Reused()
    split = Reused()
    split.load_state_dict(full.state_dict())
    for round_ in range(3):
        hidden = torch.randn(3, 6, generator=torch.Generator().manual_seed(round_))
        deferred = Deferred()
        expected = gradients(full, hidden, recompute=recompute)
        assert torch.equal(gradients(split, hidden, deferred, recompute), expected)
        assert len(deferred) == 1
        run_deferred(deferred)
        for (name, own), other in zip(split.named_parameters(), full.parameters(), strict=True):
            assert torch.equal(own.grad, other.grad), name


def test_a_weight_that_is_a_value_of_the_chain_has_its_gradient_at_once():
    weight, deferred = torch.randn(3, 3, requires_grad=True), Deferred()
    with DeferWeightGradients(deferred):
        nn.functional.linear(torch.randn(2, 3), weight).sum().backward()
    assert not deferred
    assert weight.grad is not None


def test_weights_that_were_computed_or_are_frozen_are_left_to_autograd():
    weight = torch.randn(3, 3, requires_grad=True)
    deferred = Deferred()
    with DeferWeightGradients(deferred):
        nn.functional.linear(torch.randn(2, 3), weight * 2).sum().backward()
    assert not deferred
    assert weight.grad is not None
    frozen = nn.Linear(3, 3).requires_grad_(False)
    leaf = torch.randn(2, 3, requires_grad=True)
    with DeferWeightGradients(deferred):
        output = frozen(leaf)
    with deferred.collecting():
        output.sum().backward()
    run_deferred(deferred)
    assert frozen.weight.grad is None
    assert leaf.grad is not None


def named(module):
    return list(module.named_parameters())


def test_it_is_told_what_is_not_split(caplog):
    caplog.set_level("INFO")
    linear, mixed, none = nn.Linear(4, 4), layer(), nn.LayerNorm(4)
    for stage, (module, width) in enumerate([(linear, 4), (mixed, 32), (none, 4)]):
        deferred = Deferred()
        gradients(module, torch.randn(2, 3, width), deferred)
        tell_split(stage, named(module), deferred)
    info, warning = caplog.records
    assert (info.levelname, warning.levelname) == ("INFO", "WARNING")
    share = round(
        100
        * sum(item.numel() for name, item in named(mixed) if "linear" not in name)
        / sum(item.numel() for _, item in named(mixed))
    )
    assert f"stage 1: the first half of a backward computes the gradients of {share} % of its weights" in info.message
    assert info.message.endswith("such as self_attn.in_proj_weight")
    assert "stage 2: none of its weights is that of a linear layer" in warning.message


def test_a_pipeline_tells_it_once(caplog, tmp_path):
    order = tmp_path / "order.csv"
    order.write_text("0F0,0F1,0I0,0I1,0W0,0W1\n")
    batch = torch.randn(4, 6)
    with flat_pipeline(
        [nn.LayerNorm(6), nn.LayerNorm(6)],
        nn.functional.mse_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        schedule=str(order),
        num_microbatches=2,
    ) as pipeline:
        pipeline.step(batch, batch)
        pipeline.step(batch, batch)
    assert sum("backwards are not split" in record.message for record in caplog.records) == 1
