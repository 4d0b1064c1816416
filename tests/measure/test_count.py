"""Counts against closed forms, published numbers, and what blocks hold in truth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from vpipe.config.sections import ModelConfig
from vpipe.errors import ModelError
from vpipe.measure.count.count import Assumptions, count_blocks, count_kinds
from vpipe.measure.count.models import PUBLISHED, count_published
from vpipe.model.block import Block, call_block
from vpipe.model.chain import Chain
from vpipe.model.loss import CallableLoss, sum_parts
from vpipe.model.zoo import build_chain
from vpipe.planner.estimate.analytic import BlockWork, ModelWork, Operation

FP32 = Assumptions(torch.float32)
SMALL = {"num_layers": 3, "hidden_size": 64, "num_heads": 4, "intermediate_size": 192, "max_position_embeddings": 32}


def small(kind: str, **changes: Any) -> Chain:
    return build_chain(ModelConfig.model_validate({"type": kind, "vocab_size": 100, **SMALL, **changes}))


def tokens(chain: Chain, samples: int = 2, length: int = 32) -> dict[str, Tensor]:
    shapes = dict.fromkeys(chain.fields, (samples, length)) | {"next_sentence_label": (samples,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randint(1, 2, shapes[name], generator=generator) for name in chain.fields}


def flops(operations: tuple[Operation, ...]) -> int:
    return sum(item.flops * item.count for item in operations)


@pytest.fixture(scope="module")
def gpt3() -> ModelWork:
    return count_published(PUBLISHED["gpt3-175b"], [1], Assumptions())


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("bert-base", 110_106_428),
        ("bert-large", 336_226_108),
        ("gpt2", 124_439_808),
        ("gpt2-xl", 1_557_611_200),
        ("gpt3-175b", 174_604_259_328),
        ("llama-7b", 6_738_415_616),
        ("llama-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("llama3-405b", 405_853_388_800),
    ],
)
def test_parameters_are_those_that_were_published(name: str, num_parameters: int) -> None:
    published = PUBLISHED[name]
    chain = build_chain(published.model)
    words = chain.count_parameters()
    vocabulary = {"bert": 30522}.get(published.model.type, published.model.vocab_size)
    assert vocabulary is not None
    shared = vocabulary * published.model.hidden_size if chain.tied else 0
    assert sum(words) - shared == num_parameters


def test_gpt3_is_counted_by_its_four_kinds_of_blocks(gpt3: ModelWork) -> None:
    assert gpt3.num_parameters == 174_604_259_328
    assert (len(gpt3.sizes[1]), gpt3.num_kinds, gpt3.tokens_per_sample) == (194, 4, 2048)
    assert [work.name for work in gpt3.sizes[1][:3]] == ["embedding", "layer.0.attention", "layer.0.feed_forward"]
    tied = 50257 * 12288
    assert [work.tied_parameters for work in gpt3.sizes[1]] == [tied, *[0] * 192, tied]


def test_operations_of_a_layer_have_their_closed_form(gpt3: ModelWork) -> None:
    """Forward 2 per token and weight of a matrix, and 4 s^2 h for attention; the backward twice that."""
    hidden, length = 12288, 2048
    _, attention, feed_forward, *_, head = gpt3.sizes[1]
    products, scores = 2 * length * 4 * hidden**2, 4 * length**2 * hidden
    assert attention.forward_flops == products + scores
    assert flops(attention.weight_grad) == products
    assert flops(attention.input_grad) == products + scores * 5 // 2  # the kernel computes the scores again
    wide = 2 * length * 8 * hidden**2
    assert [flops(feed_forward.forward), flops(feed_forward.input_grad), flops(feed_forward.weight_grad)] == [wide] * 3
    assert head.forward_flops == 2 * length * hidden * 50257
    whole = 3 * sum(work.forward_flops for work in gpt3.sizes[1])
    matrices = 96 * 12 * hidden**2 + hidden * 50257
    assert whole == 6 * length * matrices + 3 * 96 * scores
    assert whole / (6 * length * gpt3.num_parameters) == pytest.approx(1.03, abs=0.01)


def test_activations_of_a_layer_have_their_closed_form(gpt3: ModelWork) -> None:
    """34 s b h bytes without the scores, 5 a s^2 b more with them (Korthikanti et al. 2022, equation 2)."""
    hidden, length, heads = 12288, 2048, 96
    _, attention, feed_forward, *_ = gpt3.sizes[1]
    softmax = 4 * heads * length  # what flash attention keeps of the scores: one number per row, in fp32
    small_change = 64
    held = attention.activation_bytes + feed_forward.activation_bytes
    norms = 2 * 2 * 2 * 2 * length  # mean and deviation of each token
    assert held == pytest.approx(34 * length * hidden + softmax + norms, abs=2 * norms + small_change)
    plain = count_published(PUBLISHED["gpt3-175b"], [1], Assumptions(attention="plain")).sizes[1][1]
    more = plain.activation_bytes - attention.activation_bytes
    # Of flash attention's result, softmax's sums and seeds nothing is held.
    assert more == pytest.approx(5 * heads * length**2, rel=0.01)


def test_input_and_output_are_what_crosses(gpt3: ModelWork) -> None:
    crossing = 2 * 2048 * 12288
    first, *middle, last = gpt3.sizes[1]
    assert (first.input_bytes, first.output_bytes) == (0, crossing)
    assert {(work.input_bytes, work.output_bytes) for work in middle} == {(crossing, crossing)}
    assert (last.input_bytes, last.output_bytes) == (crossing, 0)


def test_counts_grow_with_the_microbatch() -> None:
    one, four = (count_blocks(chain := small("gpt"), tokens(chain, samples), FP32) for samples in (1, 4))
    for small_work, large_work in zip(one[1:], four[1:], strict=True):  # positions are the same for all samples
        assert large_work.forward_flops == 4 * small_work.forward_flops
        assert large_work.input_bytes == 4 * small_work.input_bytes
        assert large_work.num_parameters == small_work.num_parameters
        assert large_work.activation_bytes == pytest.approx(4 * small_work.activation_bytes, rel=0.01)


@pytest.mark.parametrize("kind", ["gpt", "llama", "bert"])
def test_a_type_of_half_the_size_halves_what_is_held(kind: str) -> None:
    chain = small(kind, **({} if kind == "llama" else {"dropout": 0.0}))
    wide, narrow = (
        count_blocks(chain, tokens(chain), Assumptions(dtype, target_share=0.25))
        for dtype in (torch.float32, torch.bfloat16)
    )
    for one, two in zip(wide[1:], narrow[1:], strict=True):
        assert two.input_bytes * 2 == one.input_bytes
        assert two.forward_flops == one.forward_flops
        assert one.activation_bytes / 2 <= two.activation_bytes < one.activation_bytes


def _truth(chain: Chain, fields: dict[str, Tensor]) -> list[tuple[int, int]]:
    """Run the chain on the CPU; return for every block the bytes of storages that it holds, and of its parameters."""
    values: dict[str, Tensor] = dict(fields)
    found = []
    for index, block in enumerate(chain.blocks):
        module = chain.materialise(index, 0)
        leaves = {name: values[name].detach().requires_grad_() for name in chain.crossing(index)}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        with saved_tensors_hooks(pack, lambda kept: kept):
            written = call_block(block, module, {**fields, **leaves})
            if index == len(chain) - 1:
                totals = chain.loss.count(fields, 2)
                written = {"loss": sum_parts(chain.loss({**fields, **leaves, **written}, totals, 2))}
        for value in leaves.values():
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        for tensor in (*module.parameters(), *module.buffers(), *fields.values(), *written.values()):
            sizes.pop(tensor.untyped_storage().data_ptr(), None)
        found.append((sum(sizes.values()), sum(item.numel() for item in module.parameters())))
        values.update(written)
    return found


@pytest.mark.parametrize("kind", ["gpt", "llama", "bert"])
def test_blocks_hold_in_truth_what_was_counted(kind: str) -> None:
    chain = small(kind, dropout=0.0, attention_dropout=0.0)
    fields = tokens(chain)
    share = 1.0 if kind == "bert" else 0.0  # every label is a target
    counted = count_blocks(chain, fields, Assumptions(torch.float32, target_share=share))
    for work, (held, parameters) in zip(counted, _truth(chain, fields), strict=True):
        # The kernels of attention differ: seeds there, a mask here.
        slack = 0.07 * held if "attention" in work.name else 16
        assert abs(work.activation_bytes - held) <= slack, work.name
        assert work.num_parameters == parameters


def test_dropout_holds_one_byte_per_element() -> None:
    without, with_dropout = (
        count_blocks(chain := small("gpt", dropout=ratio), tokens(chain), FP32)[2] for ratio in (0.0, 0.1)
    )
    assert with_dropout.activation_bytes - without.activation_bytes == 2 * 32 * 64


def test_masked_tokens_are_as_many_as_assumed() -> None:
    chain = small("bert")
    few, many = (
        count_blocks(chain, tokens(chain), Assumptions(torch.float32, target_share=share))[-1] for share in (0.25, 0.5)
    )
    # Of 64 tokens, 16 more go through the transform and the output matrix.
    assert many.forward_flops - few.forward_flops == 2 * 16 * (64 * 64 + 64 * 100)


def test_alike_blocks_are_alike_and_others_are_not() -> None:
    chain = small("gpt")
    works = count_blocks(chain, tokens(chain), FP32)
    assert count_kinds(chain, works) == 4
    mixed = Chain.from_modules(
        [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)], CallableLoss(nn.functional.mse_loss)
    )
    fields = {"input": torch.zeros(2, 8), "target": torch.zeros(2, 8)}
    assert count_kinds(mixed, count_blocks(mixed, fields, FP32)) == 4  # the first gives no gradient of its input


def test_halves_of_a_backward_are_told_apart() -> None:
    chain = Chain.from_modules(
        [nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))],
        CallableLoss(nn.functional.mse_loss),
    )
    fields = {"input": torch.zeros(4, 8), "target": torch.zeros(4, 8)}
    first, second = count_blocks(chain, fields, FP32)
    assert flops(first.input_grad) == 0
    assert flops(first.weight_grad) == 2 * 4 * 8 * 8
    assert flops(second.input_grad) == flops(second.weight_grad) == 2 * 2 * 4 * 8 * 32
    # The weight half reads both layers' inputs and the gradients of their outputs.
    assert second.weight_grad_bytes == 4 * 4 * (8 + 32 + 32 + 8)
    assert second.activation_bytes == 4 * 4 * (8 + 32 + 8)  # the loss reads the output


class _Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Linear(8, 8, bias=False).requires_grad_(False)
        self.free = nn.Linear(8, 8, bias=False)
        self.register_buffer("table", torch.zeros(5))

    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = self.free(self.fixed(value))
        return result


def test_frozen_weights_and_buffers_are_no_parameters() -> None:
    chain = Chain.from_modules([_Frozen(), _Frozen()], CallableLoss(nn.functional.mse_loss))
    fields = {"input": torch.zeros(4, 8), "target": torch.zeros(4, 8)}
    work = count_blocks(chain, fields, FP32)[1]
    assert (work.num_parameters, work.buffer_bytes) == (64, 4 * (64 + 5))


class _Looking(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value if value.sum() > 0 else -value


def test_a_block_that_looks_at_values_is_refused() -> None:
    block = Block("looking", _Looking, ("input",), ("hidden",))
    chain = Chain((block,), ("input", "target"), CallableLoss(nn.functional.mse_loss))
    with pytest.raises(ModelError, match="block 'looking' cannot be counted on the meta device"):
        count_blocks(chain, {"input": torch.zeros(2, 3), "target": torch.zeros(2, 3)}, FP32)


def test_samples_too_long_for_a_published_model_are_refused() -> None:
    with pytest.raises(ModelError, match="samples of 4096 tokens do not fit a model with max_position_embeddings 1024"):
        count_published(replace(PUBLISHED["gpt2"], sequence_length=4096), [1], Assumptions())


def test_nothing_is_left_of_a_count() -> None:
    works: tuple[BlockWork, ...] = count_blocks(chain := small("gpt"), tokens(chain), FP32)
    assert works == count_blocks(chain, tokens(chain), FP32)
