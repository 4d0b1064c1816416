from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from vpipe.data.bert.masking import IGNORED, mask_tokens
from vpipe.data.draws import Stream
from vpipe.data.text.vocabulary import CLS, MASK, NUM_SPECIAL, PAD, SEP, UNK

VOCAB = 1000


def _mask(tokens: NDArray[np.int64], **changes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    keywords = {"vocab_size": VOCAB, "seed": 0, "epoch": 0, **changes}
    return mask_tokens(tokens, np.arange(len(tokens)), stream=Stream.MASK_TRAIN, **keywords)


def _tokens(num_rows: int = 1000, length: int = 100) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(NUM_SPECIAL, VOCAB, (num_rows, length))


def test_shares() -> None:
    tokens = _tokens()
    input_ids, labels = _mask(tokens)
    targets = labels != IGNORED
    assert (targets.sum(axis=1) == 15).all()
    hidden = (input_ids == MASK) & targets
    same = (input_ids == tokens) & targets
    assert hidden.sum() / targets.sum() == pytest.approx(0.8, abs=0.01)
    assert same.sum() / targets.sum() == pytest.approx(0.1, abs=0.01)
    replaced = input_ids[targets & ~hidden & ~same]
    assert len(replaced) / targets.sum() == pytest.approx(0.1, abs=0.01)
    assert replaced.min() >= NUM_SPECIAL
    assert replaced.max() < VOCAB
    assert len(np.unique(replaced)) > VOCAB / 2


def test_every_position_is_as_likely() -> None:
    _, labels = _mask(_tokens(4000, 20))
    shares = (labels != IGNORED).mean(axis=0)
    assert np.abs(shares - 0.15).max() < 0.02


def test_only_targets_change_and_labels_are_the_originals() -> None:
    tokens = _tokens()
    input_ids, labels = _mask(tokens)
    targets = labels != IGNORED
    assert np.array_equal(input_ids[~targets], tokens[~targets])
    assert np.array_equal(labels[targets], tokens[targets])


def test_special_tokens_are_never_targets() -> None:
    tokens = np.array([[CLS, 10, UNK, SEP, 11, SEP, PAD, PAD]] * 200)
    input_ids, labels = _mask(tokens)
    special = tokens < NUM_SPECIAL
    assert (labels[special] == IGNORED).all()
    assert np.array_equal(input_ids[special], tokens[special])


@pytest.mark.parametrize(("ordinary", "targets"), [(0, 0), (1, 1), (9, 1), (10, 2), (20, 3), (100, 15)])
def test_number_of_targets(ordinary: int, targets: int) -> None:
    tokens = np.full((3, 110), PAD)
    tokens[:, 1 : 1 + ordinary] = 50
    assert ((_mask(tokens)[1] != IGNORED).sum(axis=1) == targets).all()


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_change_the_masks(change: dict[str, int]) -> None:
    assert not np.array_equal(_mask(_tokens(4), **change)[1], _mask(_tokens(4))[1])


def test_a_row_does_not_depend_on_its_company() -> None:
    tokens = _tokens(10)
    input_ids, labels = _mask(tokens)
    rows = np.array([7, 2])
    some = mask_tokens(tokens[rows], rows, vocab_size=VOCAB, seed=0, stream=Stream.MASK_TRAIN)
    assert np.array_equal(some[0], input_ids[rows])
    assert np.array_equal(some[1], labels[rows])
