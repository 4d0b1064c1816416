"""Which values cross a cut, and which chains are refused."""

import pytest
from torch import nn

from vpipe.errors import ModelError
from vpipe.model.chain import Block, Chain, ParameterRef
from vpipe.model.loss import CallableLoss


def block(name: str, inputs: str, outputs: str) -> Block:
    return Block(name, nn.Identity, tuple(inputs.split()), tuple(outputs.split()))


def chain(*blocks: Block, loss: str = "hidden", fields: str = "input mask target", **options: object) -> Chain:
    reads = CallableLoss(lambda *tensors: tensors[0], tuple(loss.split()))
    return Chain(blocks, tuple(fields.split()), reads, **options)  # type: ignore[arg-type]


LINE = [block("a", "input", "hidden"), block("b", "hidden mask", "hidden"), block("c", "hidden", "hidden")]


def test_one_value_crosses_each_cut_of_a_line():
    line = chain(*LINE)
    assert [line.crossing(cut) for cut in range(4)] == [(), ("hidden",), ("hidden",), ("hidden",)]


def test_a_skip_connection_crosses_every_cut_up_to_its_reader():
    skip = chain(
        block("a", "input", "hidden skip"),
        block("b", "hidden", "hidden"),
        block("c", "hidden skip", "hidden"),
        block("d", "hidden", "hidden"),
    )
    assert [skip.crossing(cut) for cut in (1, 2, 3)] == [("hidden", "skip"), ("hidden", "skip"), ("hidden",)]


def test_crossing_values_come_in_the_order_of_their_first_reader():
    late = chain(block("a", "input", "x y z"), block("b", "z", "hidden"), block("c", "hidden y x", "hidden"))
    assert late.crossing(1) == ("z", "y", "x")


def test_a_value_that_is_overwritten_before_anyone_reads_it_does_not_cross():
    rewritten = chain(
        block("a", "input", "hidden extra"),
        block("b", "hidden extra", "hidden"),
        block("c", "hidden", "hidden extra"),
        block("d", "hidden extra", "hidden"),
    )
    assert [rewritten.crossing(cut) for cut in (1, 2, 3)] == [("hidden", "extra"), ("hidden",), ("hidden", "extra")]


def test_a_block_that_reads_what_it_overwrites_still_needs_it():
    assert chain(block("a", "input", "x"), block("b", "x", "x hidden"), loss="hidden x").crossing(1) == ("x",)


def test_values_that_only_the_loss_reads_cross_all_later_cuts():
    early = chain(block("a", "input", "hidden aux"), block("b", "hidden", "hidden"), loss="hidden aux target")
    assert [early.crossing(cut) for cut in (1, 2)] == [("hidden", "aux"), ("hidden", "aux")]


def test_batch_fields_never_cross_and_belong_to_the_stages_that_read_them():
    line = chain(*LINE, loss="hidden target")
    assert all("mask" not in line.crossing(cut) and "input" not in line.crossing(cut) for cut in range(4))
    assert line.fields_of(0, 1) == ("input",)
    assert line.fields_of(0, 2) == ("input", "mask")
    assert line.fields_of(1, 3) == ("mask", "target")
    assert line.fields_of(2, 2) == ()


@pytest.mark.parametrize(
    ("blocks", "options", "message"),
    [
        ([], {}, "a chain needs at least one block"),
        (
            [block("a", "inptu", "hidden")],
            {},
            "block 'a' reads 'inptu', which no earlier block writes and which is no batch field; "
            "known here: 'input', 'mask', 'target'",
        ),
        (
            [block("a", "input", "logits")],
            {},
            "the loss reads 'hidden', which no earlier block writes and which is no batch field; "
            "known here: 'input', 'logits', 'mask', 'target'",
        ),
        (
            [*LINE, block("d", "hidden", "logits")],
            {},
            "block 'd' writes 'logits', and neither a later block nor the loss reads it; what they read is 'hidden'",
        ),
        (
            [block("a", "input", "lost"), block("b", "input", "lost"), block("c", "lost", "hidden")],
            {},
            "block 'a' writes 'lost', and neither",
        ),
        ([block("a", "input", ""), *LINE[1:]], {}, "block 'b' reads 'hidden', which no earlier block writes"),
        ([LINE[0], LINE[0]], {}, "block names must differ; given more than once: 'a'"),
        (
            [block("a", "input", "hidden hidden")],
            {},
            "the outputs of block 'a' must differ; given more than once: 'hidden'",
        ),
        (LINE, {"fields": "input mask input"}, "batch fields must differ; given more than once: 'input'"),
        ([block("a", "input", "mask")], {}, "block 'a' writes 'mask', which is a batch field; rename its output"),
        (
            LINE,
            {"tied": ((ParameterRef(0, "w"), ParameterRef(3, "w")),)},
            "a tied group names blocks [0, 3]; the chain has blocks 0 to 2",
        ),
        (LINE, {"tied": ((ParameterRef(0, "w"),),)}, "one parameter in each of two or more blocks, in block order"),
        (
            LINE,
            {"tied": ((ParameterRef(1, "w"), ParameterRef(0, "w")),)},
            "in block order; this one names blocks [1, 0]",
        ),
        (
            LINE,
            {"tied": ((ParameterRef(0, "w"), ParameterRef(1, "w")), (ParameterRef(0, "w"), ParameterRef(2, "w")))},
            "tied parameters must differ; given more than once: 'w of block 0'",
        ),
    ],
)
def test_chains_that_cannot_work_are_refused_with_the_reason(blocks, options, message):
    with pytest.raises(ModelError) as error:
        chain(*blocks, **options)
    assert message in str(error.value)


def test_global_names_take_the_first_matching_prefix_or_the_name_of_the_block():
    mapped = Block("b", nn.Identity, (), (), keys=(("inner.bias", "bias"), ("inner.", "model.")))
    assert mapped.global_name("inner.bias") == "bias"
    assert mapped.global_name("inner.weight") == "model.weight"
    assert mapped.global_name("outer.weight") == "b.outer.weight"
