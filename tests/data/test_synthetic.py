from __future__ import annotations

import pytest
import torch

from vpipe.data.bert.dataset import bert_fields
from vpipe.data.source import BatchSource, FieldSpec
from vpipe.data.synthetic import SyntheticBertSource, SyntheticSource
from vpipe.errors import ConfigError

FIELDS = ["input_ids", "token_type_ids", "attention_mask", "labels", "next_sentence_label"]


def _bert(**changes: int) -> SyntheticBertSource:
    return SyntheticBertSource(2000, **{"sequence_length": 64, "vocab_size": 500, "seed": 1, **changes})


def _generic(seed: int = 0) -> SyntheticSource:
    specs = {"image": FieldSpec((3, 8), torch.float32), "target": FieldSpec((), torch.int64)}
    return SyntheticSource(specs, 1000, seed=seed, num_values={"target": 10})


def test_bert_statistics() -> None:
    source = _bert()
    assert isinstance(source, BatchSource)
    assert source.fields == bert_fields(64)
    batch = source.batch(range(2000), FIELDS)
    targets = batch["labels"] != -100
    ordinary = batch["attention_mask"].sum() - 3 * 2000
    assert float(targets.sum() / ordinary) == pytest.approx(0.15, abs=0.005)
    assert float((batch["input_ids"] == 4).sum() / targets.sum()) == pytest.approx(0.8, abs=0.01)
    assert float(batch["next_sentence_label"].float().mean()) == pytest.approx(0.5, abs=0.04)
    full = batch["attention_mask"].sum(dim=1) == 64
    assert float(full.float().mean()) == pytest.approx(0.9, abs=0.03)
    assert batch["input_ids"].max() < 500
    assert ((batch["input_ids"] == 3).sum(dim=1) == 2).all()


@pytest.mark.parametrize("name", FIELDS)
def test_bert_samples_do_not_depend_on_their_company(name: str) -> None:
    source = _bert()
    together = source.batch([9, 1700, 3], FIELDS)[name]
    assert torch.equal(source.batch([1700], [name])[name][0], together[1])


def test_bert_masks_change_with_the_epoch_where_asked() -> None:
    for dynamic in (False, True):
        source = _bert(dynamic=dynamic)
        same = torch.equal(source.batch([0], ["labels"])["labels"], source.batch([0], ["labels"], epoch=1)["labels"])
        assert same is not dynamic


def test_bert_seed() -> None:
    assert not torch.equal(_bert().batch([0], FIELDS)["input_ids"], _bert(seed=2).batch([0], FIELDS)["input_ids"])


@pytest.mark.parametrize("sequence_length", [5, 6, 9])
def test_shortest_sequences(sequence_length: int) -> None:
    batch = _bert(sequence_length=sequence_length).batch(range(200), FIELDS)
    assert ((batch["input_ids"] == 3).sum(dim=1) == 2).all()
    assert (batch["token_type_ids"].sum(dim=1) >= 2).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 4}, "data.sequence_length must be at least 5 for BERT, got 4"),
        ({"vocab_size": 5}, "model.vocab_size must be above 5, the special tokens, got 5"),
    ],
)
def test_bert_limits(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _bert(**change)


def test_generic_values() -> None:
    source = _generic()
    batch = source.batch(range(1000), ["image", "target"])
    assert batch["image"].shape == (1000, 3, 8)
    assert float(batch["image"].mean()) == pytest.approx(0, abs=0.03)
    assert float(batch["image"].std()) == pytest.approx(1, abs=0.03)
    assert sorted(set(batch["target"].tolist())) == list(range(10))
    assert batch["target"].dtype == torch.int64


def test_generic_samples_depend_on_seed_and_number() -> None:
    source = _generic()
    together = source.batch([4, 900], ["target", "image"])
    # Logarithm and cosine of other numbers of rows may be rounded by other instructions.
    torch.testing.assert_close(source.batch([900], ["image"], epoch=5)["image"][0], together["image"][1])
    assert not torch.equal(together["image"][0], together["image"][1])
    assert not torch.equal(_generic(seed=1).batch([4], ["image"])["image"][0], together["image"][0])


def test_generic_limits() -> None:
    specs = {"target": FieldSpec((), torch.int64)}
    with pytest.raises(ConfigError, match="num_values has 'label: 3'; fields are target"):
        SyntheticSource(specs, 10, num_values={"label": 3})
    with pytest.raises(ConfigError, match="synthetic_samples must be at least 1, got 0"):
        SyntheticSource(specs, 0)
