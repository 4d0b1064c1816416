"""Shapes, types and gradients of what crosses a cut, without memory."""

import pytest
import torch
from torch import Tensor, nn

from vpipe.errors import ModelError
from vpipe.model.chain import Block, Chain, ValueSpec, call_block
from vpipe.model.loss import CallableLoss

LOSS = CallableLoss(nn.functional.mse_loss)
INPUT = {"input": torch.empty(2, 8, device="meta")}


class Embed(nn.Module):
    """Write a float, an integer and a boolean value."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.embedding(ids), ids + 1, ids.ne(0)


class Join(nn.Module):
    def forward(self, hidden: Tensor, ids: Tensor, keep: Tensor) -> Tensor:
        return hidden.sum(-1) * ids * keep


def kinds() -> Chain:
    blocks = (
        Block("embed", Embed, ("input",), ("hidden", "ids", "keep")),
        Block("half", lambda: nn.Linear(4, 6).to(torch.bfloat16).to(torch.float32), ("hidden",), ("hidden",)),
        Block("join", Join, ("hidden", "ids", "keep"), ("hidden",)),
    )
    return Chain(blocks, ("input", "target"), LOSS)


def test_every_kind_of_value_crosses_with_its_shape_and_type():
    specs = kinds().infer([1, 2, 3], {"input": torch.empty(2, 5, dtype=torch.int64, device="meta")})
    assert specs == {
        1: (
            ValueSpec("hidden", (2, 5, 4), torch.float32, True),
            ValueSpec("ids", (2, 5), torch.int64, False),
            ValueSpec("keep", (2, 5), torch.bool, False),
        ),
        2: (
            ValueSpec("hidden", (2, 5, 6), torch.float32, True),
            ValueSpec("ids", (2, 5), torch.int64, False),
            ValueSpec("keep", (2, 5), torch.bool, False),
        ),
        3: (ValueSpec("hidden", (2, 5), torch.float32, True),),
    }
    assert [spec.num_bytes for spec in specs[1]] == [160, 80, 10]


def test_what_is_inferred_is_what_runs():
    chain = kinds()
    ids = torch.arange(10).reshape(2, 5)
    values = {"input": ids}
    for index, block in enumerate(chain.blocks):
        for spec in chain.infer([index], {"input": ids}).get(index, ()):
            value = values[spec.name]
            assert (tuple(value.shape), value.dtype, value.requires_grad) == (
                spec.shape,
                spec.dtype,
                spec.requires_grad,
            )
        values |= call_block(block, chain.materialise(index, seed=0), values)


def test_what_comes_out_of_frozen_blocks_needs_no_gradient():
    chain = Chain.from_modules([nn.Linear(8, 4).requires_grad_(False), nn.Linear(4, 4)], LOSS)
    assert [chain.infer([cut], INPUT)[cut][0].requires_grad for cut in (1, 2)] == [False, True]


def test_inference_does_not_depend_on_the_callers_grad_mode_and_leaves_its_random_state():
    chain = Chain.from_modules([nn.Linear(8, 4), nn.Dropout(0.5)], LOSS)
    before = torch.get_rng_state()
    with torch.no_grad():
        assert chain.infer([2], INPUT)[2][0].requires_grad
    assert torch.equal(torch.get_rng_state(), before)


def test_inference_changes_nothing_in_existing_modules():
    norm = nn.BatchNorm1d(8)
    Chain.from_modules([norm, nn.Linear(8, 4)], LOSS).infer([1, 2], INPUT)
    assert norm.num_batches_tracked == 0
    assert not norm.weight.is_meta


def test_blocks_after_the_last_cut_are_not_run():
    class Picky(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden[hidden > hidden.mean().item()]

    chain = Chain.from_modules([nn.Linear(8, 4), Picky()], LOSS)
    assert chain.infer([1], INPUT)[1][0].shape == (2, 4)
    assert len(chain.infer([2], INPUT)[2][0].shape) == 1


def test_no_cut_needs_no_run_and_no_field():
    assert kinds().infer([], {}) == {}
    assert kinds().infer([0], {}) == {0: ()}


def test_sizes_that_do_not_fit_are_reported_with_the_block_and_the_shapes():
    chain = Chain.from_modules([nn.Linear(8, 4), nn.Linear(5, 4)], LOSS)
    with pytest.raises(ModelError, match=r"block '1' cannot run with hidden \(2, 4\).*check the sizes"):
        chain.infer([2], INPUT)


def test_writing_into_what_crossed_a_cut_is_found_before_the_run():
    chain = Chain.from_modules([nn.Linear(8, 4), nn.ReLU(inplace=True)], LOSS)
    assert chain.infer([2], INPUT)[2][0].shape == (2, 4)
    with pytest.raises(
        ModelError, match=r"block '1' changes an input in place that comes from the stage before; .*inplace"
    ):
        chain.infer([1, 2], INPUT)


def test_a_missing_field_and_a_cut_outside_are_named():
    with pytest.raises(ModelError, match="block 'embed' reads the batch field 'input'; the batch has 'target'"):
        kinds().infer([1], {"target": torch.empty(2)})
    with pytest.raises(ModelError, match="cut 4 is outside the chain, which has cuts 0 to 3"):
        kinds().infer([4], INPUT)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.LSTM(8, 4), r"block '1' cannot run with hidden \(tuple\): TypeError: linear\(\): argument 'input'"),
        (nn.ModuleList(), "cannot run with input"),
    ],
)
def test_a_module_that_writes_something_else_is_named(module, message):
    with pytest.raises(ModelError, match=message):
        Chain.from_modules([module, nn.Linear(4, 4)], LOSS).infer([1, 2], INPUT)


def test_parameters_are_counted_without_memory():
    huge = Block("huge", lambda: nn.Linear(10**6, 10**6), ("input",), ("hidden",))
    chain = Chain((huge, Block("small", lambda: nn.Linear(3, 2), ("hidden",), ("hidden",))), ("input", "target"), LOSS)
    assert chain.count_parameters() == (10**12 + 10**6, 8)


def test_names_of_one_tensor_and_of_one_memory_are_told():
    class Three(nn.Module):
        def forward(self, x):
            hidden = x * 2
            first, second = hidden.chunk(2, -1)
            return hidden, hidden, first, second, hidden.detach()

    names = ("a", "b", "first", "second", "c")
    blocks = (
        Block("0", Three, ("input",), names),
        Block("1", lambda: _Sum(), names, ("hidden",)),
    )
    chain = Chain(blocks, ("input", "target"), CallableLoss(nn.functional.mse_loss))
    specs = {spec.name: spec for spec in chain.infer([1], {"input": torch.ones(3, 4)})[1]}
    assert {name: spec.same_as for name, spec in specs.items()} == {**dict.fromkeys(names), "b": "a"}
    assert specs["second"].alias in ("a", "b", "c")
    assert specs["first"].alias != "second"


class _Sum(nn.Module):
    def forward(self, *values):
        return values[0]
