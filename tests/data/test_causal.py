"""Text for models that predict the next token, out of a set with masks."""

import pytest
import torch

from vpipe.data.causal import CausalSource
from vpipe.data.source import ArraySource
from vpipe.data.synthetic import SyntheticBertSource
from vpipe.errors import DataError


def test_masks_are_undone_and_padding_is_no_target():
    arrays = {
        "input_ids": torch.tensor([[2, 3, 9, 7, 0], [5, 4, 4, 3, 8]]),  # 3 hides a token, 9 replaces one
        "labels": torch.tensor([[-100, 6, 8, -100, -100], [-100, -100, 4, 7, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
    }
    source = CausalSource(ArraySource(arrays))
    found = source.batch([1, 0], ["labels", "input_ids"])
    assert found["input_ids"].tolist() == [[5, 4, 4, 7, 8], [2, 6, 8, 7, 0]]
    assert found["labels"].tolist() == [[5, 4, 4, 7, 8], [2, 6, 8, 7, -100]]
    assert list(source.fields) == ["input_ids", "labels"]
    assert source.num_samples == 2
    assert source.batch([0], []) == {}


def test_masks_that_change_change_nothing():
    source = CausalSource(SyntheticBertSource(8, sequence_length=32, vocab_size=50, dynamic=True))
    first, second = (source.batch([3, 5], ["input_ids", "labels"], epoch=epoch) for epoch in (0, 4))
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["labels"], second["labels"])


def test_other_fields_are_refused():
    with pytest.raises(DataError, match="no field 'attention_mask'; it has input_ids, labels"):
        CausalSource(SyntheticBertSource(8, sequence_length=32, vocab_size=50)).batch([0], ["attention_mask"])
