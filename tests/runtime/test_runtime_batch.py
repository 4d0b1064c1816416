"""What users call a batch, and what they may get wrong about it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vpipe.data.source import FieldSpec
from vpipe.errors import DataError
from vpipe.model.chain import Chain
from vpipe.model.loss import CallableLoss
from vpipe.runtime.batch import Batch, as_batch, as_input, field_tensors

CHAIN = Chain.from_modules([nn.Linear(2, 2)], CallableLoss(nn.functional.mse_loss))
SINGLE = Chain.from_modules([nn.Linear(2, 2)], CallableLoss(torch.mean, ("hidden",)), fields=("input",))
X, Y = torch.zeros(4, 2), torch.ones(4, 2)


@pytest.mark.parametrize("data", [(X, Y), [X, Y], {"input": X, "target": Y}, {"target": Y, "input": X}])
def test_tuples_lists_and_dictionaries_are_batches(data):
    batch = as_batch(data, CHAIN)
    assert batch.num_samples == 4
    assert batch.fields["input"] is X
    assert batch.fields["target"] is Y


def test_a_tensor_is_a_batch_of_a_model_with_one_field():
    assert as_batch(X, SINGLE).fields == {"input": X}
    with pytest.raises(
        DataError, match="the batch has 1 tensors and the model reads 2 fields: input, target; give one"
    ):
        as_batch(X, CHAIN)


def test_a_batch_may_have_only_some_fields():
    assert as_batch({"target": Y}, CHAIN).num_samples == 4
    batch = Batch({}, 4)
    assert as_batch(batch, CHAIN) is batch


def test_what_only_the_loss_reads_is_left_out_of_an_input():
    wanted = CHAIN.without_loss()
    assert wanted.fields == ("input",)
    for data in (X, [X], (X, Y), (X, None), {"input": X}, {"input": X, "target": None}, Batch({"input": X}, 4)):
        assert as_input(data, CHAIN, wanted).fields == {"input": X}
    described = CHAIN.with_field_specs({name: FieldSpec((2,), torch.float32) for name in CHAIN.fields})
    batch = as_input({"target": Y}, described, described.without_loss())
    assert (batch.fields, batch.num_samples) == ({}, 4)
    with pytest.raises(DataError, match="the batch has no fields; the model reads input"):
        as_input({"target": Y}, CHAIN, wanted)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ((X, Y, X), "has 3 tensors and the model reads 2 fields: input, target; give one for each"),
        ((), "has 0 tensors and the model reads 2"),
        ({}, "the batch has no fields; the model reads input, target"),
        ({"input": X, "label": Y}, "a field 'label' that the model does not read; it reads input, target"),
        ((X, Y[:3]), "'target' has 3 rows in a batch of 4 samples"),
        ((X, [1, 2, 3, 4]), "'target' has a list of 4 items that are no tensors; make it a tensor"),
        ((X, torch.tensor(1.0)), "'target' is a number; a batch holds tensors"),
        ((torch.tensor(1.0), Y), "'input' is a number"),
        (7, r"a batch is of type int; give tensors in the order of the model's fields \(input, target\)"),
    ],
)
def test_mistakes_are_told(data, text):
    with pytest.raises(DataError, match=text):
        as_batch(data, CHAIN)


def test_a_batch_has_samples():
    with pytest.raises(DataError, match="a batch has 0 samples; leave such batches out"):
        as_batch((X[:0], Y[:0]), CHAIN)


def test_a_batch_of_its_own_is_checked_too():
    with pytest.raises(DataError, match="'input' has 4 rows in a batch of 5 samples"):
        Batch({"input": X}, 5)


def test_fields_are_described_by_the_first_batch_or_by_specs():
    found = field_tensors(CHAIN, as_batch((X, Y.int()), CHAIN), 2)
    assert {name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in found.items()} == {
        "input": ((2, 2), torch.float32, "meta"),
        "target": ((2, 2), torch.int32, "meta"),
    }
    specs = {name: FieldSpec((7,), torch.int64) for name in ("input", "target", "more")}
    assert {tensor.shape for tensor in field_tensors(CHAIN.with_field_specs(specs), Batch({}, 4), 3).values()} == {
        (3, 7)
    }


def test_fields_that_nobody_describes_are_named():
    with pytest.raises(DataError, match=r"reads the field 'target'.*it has input: give all fields on every rank, or"):
        field_tensors(CHAIN, Batch({"input": X}, 4), 2)
    with pytest.raises(
        DataError, match=r"reads the field 'input'.*it has none: add it to the data or to the field_specs"
    ):
        field_tensors(CHAIN.with_field_specs({}), Batch({}, 4), 2)
