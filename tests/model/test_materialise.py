"""Weights that depend on the seed and the block only."""

import pytest
import torch
from torch import Tensor, nn

from vpipe.errors import ModelError
from vpipe.model.chain import Block, Chain, ParameterRef
from vpipe.model.loss import CallableLoss

LOSS = CallableLoss(nn.functional.mse_loss)


def linears(num_blocks: int, device: str = "cpu") -> Chain:
    return Chain.from_modules([nn.Linear(3, 3, device=device) for _ in range(num_blocks)], LOSS)


def factories(num_blocks: int, **options: object) -> Chain:
    blocks = [
        Block(f"b{index}", lambda: nn.Linear(3, 3), ("hidden" if index else "input",), ("hidden",))
        for index in range(num_blocks)
    ]
    return Chain(tuple(blocks), ("input", "target"), LOSS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("chain", [factories(3), linears(3, "meta")], ids=["factory", "meta"])
def test_weights_do_not_depend_on_which_blocks_were_built_before(chain):
    in_order = [chain.materialise(index, seed=5).weight for index in range(3)]
    torch.rand(7)
    backwards = [chain.materialise(index, seed=5).weight for index in (2, 1, 0)][::-1]
    assert all(torch.equal(one, other) for one, other in zip(in_order, backwards, strict=True))
    assert not torch.equal(in_order[0], in_order[1])
    assert not torch.equal(in_order[0], chain.materialise(0, seed=6).weight)


@pytest.mark.parametrize("chain", [factories(1), linears(1, "meta")], ids=["factory", "meta"])
def test_the_random_state_is_left_as_it_was(chain):
    before = torch.get_rng_state()
    chain.materialise(0, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_random_state_is_restored_when_a_build_fails():
    def build() -> nn.Module:
        torch.rand(1)
        raise ValueError("no")

    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="no"):
        Chain((Block("a", build, ("input",), ("hidden",)),), ("input", "target"), LOSS).materialise(0, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_default_device_of_the_caller_does_not_reach_the_weights():
    with torch.device("meta"):
        assert factories(1).materialise(0, seed=1).weight.device.type == "cpu"


def test_existing_modules_keep_their_weights_and_every_build_is_a_copy():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).eval())
    chain = Chain.from_modules(model, LOSS)
    first, again = chain.materialise(1, seed=1), chain.materialise(1, seed=2)
    assert torch.equal(first.weight, model[1].weight)
    assert first is not model[1]
    assert first is not again
    assert not first.training
    assert chain.blocks[1].global_name("weight") == "1.weight"


def test_a_meta_module_is_not_changed_by_being_materialised():
    model = nn.Sequential(nn.Linear(3, 3, device="meta"))
    chain = Chain.from_modules(model, LOSS)
    assert not chain.materialise(0, seed=1).weight.is_meta
    assert model[0].weight.is_meta


def test_a_meta_transformer_layer_starts_like_one_built_in_place():
    layer = nn.TransformerEncoderLayer(8, 2, 16, device="meta")
    module = Chain.from_modules([layer], LOSS).materialise(0, seed=1)
    assert not any(tensor.is_meta for tensor in module.state_dict().values())
    # The attention's own initialisation zeroes a bias that its child's would draw.
    assert module.self_attn.out_proj.bias.count_nonzero() == 0
    assert module.self_attn.in_proj_weight.std() > 0


class TiedInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.inner[1].weight = self.inner[0].weight

    def forward(self, value: Tensor) -> Tensor:
        return self.inner(value)


def test_parameters_shared_inside_a_meta_block_stay_one():
    with torch.device("meta"):
        module = TiedInside()
    built = Chain.from_modules([module], LOSS).materialise(0, seed=1)
    assert built.inner[0].weight is built.inner[1].weight
    assert built.inner[0].weight.abs().max() < 1


def test_parts_that_have_memory_keep_their_values_beside_parts_that_do_not():
    mixed = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"), nn.BatchNorm1d(3, device="meta"))
    built = Chain.from_modules([mixed], LOSS).materialise(0, seed=1)
    assert torch.equal(built[0].weight, mixed[0].weight)
    assert built[2].running_var.tolist() == [1, 1, 1]
    assert not any(tensor.is_meta for tensor in built.state_dict().values())


class Scale(nn.Module):
    def __init__(self, persistent: bool | None = None) -> None:
        super().__init__()
        if persistent is None:
            self.factor = nn.Parameter(torch.ones(1))
        else:
            self.register_buffer("factor", torch.ones(1), persistent=persistent)

    def forward(self, value: Tensor) -> Tensor:
        return value * self.factor


@pytest.mark.parametrize("persistent", [None, True, False])
def test_a_meta_module_that_cannot_initialise_itself_is_named(persistent):
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 3), Scale(persistent))
    chain = Chain.from_modules([module], LOSS)
    with pytest.raises(
        ModelError, match=r"block '0' .* its part '1' \(Scale\) has no reset_parameters\(\); give it one"
    ):
        chain.materialise(0, seed=1)


def test_a_factory_must_return_a_module():
    chain = Chain((Block("a", lambda: 3, ("input",), ("hidden",)),), ("input",), CallableLoss(abs, ("hidden",)))
    with pytest.raises(ModelError, match=r"build of block 'a' returned int; it must return a torch\.nn\.Module"):
        chain.materialise(0, seed=1)


def test_tied_parameters_start_as_the_first_of_their_group():
    tied = ((ParameterRef(0, "weight"), ParameterRef(2, "weight")),)
    chain, plain = factories(3, tied=tied), factories(3)
    assert torch.equal(chain.materialise(2, seed=4).weight, chain.materialise(0, seed=4).weight)
    assert torch.equal(chain.materialise(0, seed=4).weight, plain.materialise(0, seed=4).weight)
    assert torch.equal(chain.materialise(2, seed=4).bias, plain.materialise(2, seed=4).bias)


def test_tied_parameters_that_do_not_exist_or_do_not_fit_are_named():
    with pytest.raises(ModelError, match="block 'b1' has no parameter 'wieght' to tie; it has 'weight', 'bias'"):
        factories(2, tied=((ParameterRef(0, "weight"), ParameterRef(1, "wieght")),)).materialise(1, seed=0)
    with pytest.raises(ModelError, match=r"'b1.bias' has shape \(3,\) and is tied to a parameter of shape \(3, 3\)"):
        factories(2, tied=((ParameterRef(0, "weight"), ParameterRef(1, "bias")),)).materialise(1, seed=0)
