"""Chains out of modules."""

import pytest
import torch
from torch import nn

from vpipe.errors import ModelError
from vpipe.model.chain import Block, Chain, ParameterRef, call_block
from vpipe.model.loss import CallableLoss

LOSS = CallableLoss(nn.functional.mse_loss)


def run(chain: Chain, value: torch.Tensor) -> torch.Tensor:
    values = {"input": value}
    for index, block in enumerate(chain.blocks):
        values |= call_block(block, chain.materialise(index, seed=0), values)
    return values["hidden"]


@pytest.mark.parametrize("make", [nn.Sequential, lambda *m: list(m), lambda *m: tuple(m), lambda *m: nn.ModuleList(m)])
def test_a_chain_computes_what_its_modules_compute(make):
    parts = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)]
    chain = Chain.from_modules(make(*parts), LOSS)
    value = torch.rand(3, 4)
    assert [block.name for block in chain.blocks] == ["0", "1", "2"]
    assert torch.equal(run(chain, value), nn.Sequential(*parts)(value))


def test_names_are_those_of_the_state_dict():
    model = nn.Sequential()
    model.add_module("first", nn.Sequential(nn.Linear(2, 2)))
    model.add_module("norm", nn.BatchNorm1d(2))
    chain = Chain.from_modules(model, LOSS)
    names = [
        block.global_name(name)
        for index, block in enumerate(chain.blocks)
        for name in chain.materialise(index, seed=0).state_dict()
    ]
    assert names == list(model.state_dict())


def test_a_module_that_appears_twice_runs_twice_and_its_parameters_are_tied():
    shared, other = nn.Linear(4, 4), nn.ReLU()
    model = nn.Sequential(shared, other, shared, other)
    chain = Chain.from_modules(model, LOSS)
    value = torch.rand(3, 4)
    assert len(chain) == 4
    assert torch.equal(run(chain, value), model(value))
    assert chain.tied == (
        (ParameterRef(0, "weight"), ParameterRef(2, "weight")),
        (ParameterRef(0, "bias"), ParameterRef(2, "bias")),
    )


def test_one_parameter_shared_by_two_modules_is_tied():
    embed, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embed.weight
    assert Chain.from_modules([embed, nn.Tanh(), head], LOSS).tied == (
        (ParameterRef(0, "weight"), ParameterRef(2, "weight")),
    )


def test_blocks_may_stand_among_modules():
    class Mixed(nn.Module):
        def forward(self, value: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return value * mask, value

    middle = Block("middle", Mixed, ("hidden", "mask"), ("masked", "skip"))
    last = Block("last", lambda: nn.Bilinear(4, 4, 1), ("hidden", "skip"), ("hidden",))
    chain = Chain.from_modules([nn.Linear(4, 4), middle, nn.Tanh(), last], LOSS, fields=("input", "mask", "target"))
    assert chain.blocks[2].inputs == ("masked",)
    assert chain.crossing(2) == ("masked", "skip")
    assert chain.fields_of(0, 4) == ("input", "mask", "target")


def test_the_first_module_takes_the_first_field():
    chain = Chain.from_modules(
        [nn.Linear(2, 2)], CallableLoss(nn.functional.mse_loss, ("hidden", "y")), fields=("x", "y")
    )
    assert chain.blocks[0].inputs == ("x",)


class Net(nn.Module):
    pass


def normed_twice():
    norm = nn.BatchNorm1d(2)
    return [nn.Linear(2, 2), norm, nn.Linear(2, 2), norm]


def test_constants_may_be_shared():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("by", torch.ones(2), persistent=False)

    shift = Shift()
    assert len(Chain.from_modules([shift, nn.Linear(2, 2), shift], LOSS)) == 3


def computed():
    module = nn.Linear(2, 2)
    module.register_buffer("scaled", module.weight * 2)
    return module


def test_what_cannot_be_copied_is_told():
    chain = Chain.from_modules([computed()], LOSS)
    with pytest.raises(ModelError, match=r"a Linear of the chain cannot be copied: Only Tensors .*parametrizations"):
        chain.materialise(0, 0)


@pytest.mark.parametrize(
    ("modules", "fields", "message"),
    [
        (Net(), ("input", "target"), "made of an nn.Sequential or a list of modules, not of Net; list its layers"),
        ([nn.Linear(2, 2), torch.relu], ("input", "target"), "item 1 of the chain is of type builtin_function"),
        (normed_twice(), ("input", "target"), "items 1 and 3 of the chain share the buffer 'running_mean', and stages"),
        ([nn.LazyLinear(2)], ("input", "target"), "item 0 of the chain, LazyLinear, has parameters without a shape"),
        ([], ("input", "target"), "a chain needs at least one block"),
        ([nn.Linear(2, 2)], (), "needs at least one batch field"),
        ([nn.Linear(2, 2)], ("input",), "the loss reads 'target'"),
        ([nn.Linear(2, 2), Block("0", Net, ("hidden",), ("hidden",))], ("input", "target"), "block names must differ"),
    ],
)
def test_what_is_no_chain_of_modules_is_refused(modules, fields, message):
    with pytest.raises(ModelError) as error:
        Chain.from_modules(modules, LOSS, fields=fields)
    assert message in str(error.value)
