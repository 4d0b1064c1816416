from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from vpipe.data.bert.pairs import NUM_MARKERS, build_pairs, pair_rows
from vpipe.data.draws import Stream
from vpipe.data.text.flat import FlatText, tokenize_documents
from vpipe.data.text.vocabulary import CLS, PAD, SEP
from vpipe.data.text.wordpiece import train_wordpiece


def _text(documents: Sequence[Sequence[int]]) -> FlatText:
    """Documents given as lengths of sentences; the tokens are numbered from 100."""
    lengths = [length for document in documents for length in document]
    return FlatText(
        np.arange(100, 100 + sum(lengths), dtype=np.int32),
        np.cumsum([0, *lengths]),
        np.cumsum([0, *(len(document) for document in documents)]),
    )


def _pairs(text: FlatText, sequence_length: int = 32, *, seed: int = 0, num_passes: int = 1) -> NDArray[np.int64]:
    return build_pairs(text, sequence_length, seed=seed, stream=Stream.PAIRS_TRAIN, num_passes=num_passes)


def _many(num_documents: int = 400, seed: int = 0) -> FlatText:
    rng = np.random.default_rng(seed)
    return _text([rng.integers(1, 20, rng.integers(1, 12)).tolist() for _ in range(num_documents)])


def _document_of(text: FlatText, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(text.sentences[text.documents], positions, side="right") - 1


@pytest.mark.parametrize("sequence_length", [8, 16, 32, 512])
def test_pairs_fit_and_have_two_segments(sequence_length: int) -> None:
    pairs = _pairs(_many(), sequence_length)
    sizes = pairs[:, [1, 3]] - pairs[:, [0, 2]]
    assert sizes.min() >= 1
    assert sizes.sum(axis=1).max() <= sequence_length - NUM_MARKERS


def test_half_of_the_second_segments_are_random() -> None:
    assert _pairs(_many(2000))[:, 4].mean() == pytest.approx(0.5, abs=0.02)


def test_true_pairs_meet_and_random_ones_come_from_another_document() -> None:
    text = _many()
    pairs = _pairs(text)
    true, other = pairs[pairs[:, 4] == 0], pairs[pairs[:, 4] == 1]
    assert np.array_equal(true[:, 1], true[:, 2])
    assert (_document_of(text, true[:, 0]) == _document_of(text, true[:, 3] - 1)).all()
    assert (_document_of(text, other[:, 0]) != _document_of(text, other[:, 2])).all()


@pytest.mark.parametrize("column", [0, 2])
def test_no_segment_crosses_documents(column: int) -> None:
    text = _many()
    pairs = _pairs(text)
    assert np.array_equal(_document_of(text, pairs[:, column]), _document_of(text, pairs[:, column + 1] - 1))


def test_every_document_can_be_the_random_one() -> None:
    text = _text([[5, 5]] * 6)
    pairs = _pairs(text, num_passes=40)
    random_pairs = pairs[pairs[:, 4] == 1]
    met = {(int(_document_of(text, pair[0])), int(_document_of(text, pair[2]))) for pair in random_pairs}
    assert met == {(one, other) for one in range(6) for other in range(6) if one != other}


def test_length_does_not_tell_true_pairs_from_random_ones() -> None:
    pairs = _pairs(_many(4000))
    total = (pairs[:, 1] - pairs[:, 0]) + (pairs[:, 3] - pairs[:, 2])
    true, other = total[pairs[:, 4] == 0].mean(), total[pairs[:, 4] == 1].mean()
    assert other == pytest.approx(true, rel=0.08)


def test_lone_sentences_make_true_and_random_pairs() -> None:
    text = _text([[10]] * 500)
    pairs = _pairs(text)
    assert len(pairs) == 500
    assert pairs[:, 4].mean() == pytest.approx(0.5, abs=0.08)
    assert (pairs[:, 1] - pairs[:, 0] == 5).all()
    assert (pairs[:, 3] - pairs[:, 2] == 5).all()


def test_lone_tokens_make_no_pair() -> None:
    assert _pairs(_text([[1], [1], [1]])).shape == (0, 5)


def test_all_text_of_true_pairs_is_used() -> None:
    # without random pairs everything but what truncation drops is in some pair
    text = _many(300)
    used = np.zeros(len(text.tokens), dtype=bool)
    for start, first_end, second, end, label in _pairs(text, 512, num_passes=6):
        used[start:first_end] = True
        used[second:end] |= label == 0
    assert used.mean() > 0.95


def test_pairs_depend_on_the_seed_alone() -> None:
    text = _many(50)
    assert np.array_equal(_pairs(text, seed=4), _pairs(text, seed=4))
    assert not np.array_equal(_pairs(text, seed=4), _pairs(text, seed=5))


def test_passes_differ_and_add_up() -> None:
    text = _many(50)
    once, twice = _pairs(text), _pairs(text, num_passes=2)
    assert np.array_equal(twice[: len(once)], once)
    assert not np.array_equal(twice[len(once) :][: len(once)], once)


def test_layout() -> None:
    tokens = np.arange(100, 120, dtype=np.int32)
    ids, spans = pair_rows(tokens, np.array([[0, 2, 2, 5, 0], [4, 7, 0, 2, 1], [0, 1, 18, 20, 1]]), 8)
    assert ids.tolist() == [
        [CLS, 100, 101, SEP, 102, 103, 104, SEP],
        [CLS, 104, 105, 106, SEP, 100, 101, SEP],
        [CLS, 100, SEP, 118, 119, SEP, PAD, PAD],
    ]
    assert spans.tolist() == [[4, 8], [5, 8], [3, 6]]


def test_tokenized_text_keeps_its_order_and_drops_what_is_empty() -> None:
    documents = [["aa bb", "cc"], [], ["\u200b"], ["bb aa cc aa bb"]]
    tokenizer = train_wordpiece(["aa bb cc"] * 3, vocab_size=64)
    text = tokenize_documents(documents, tokenizer, max_sentence=3)
    assert text.num_documents == 2
    assert text.documents.tolist() == [0, 2, 4]
    assert text.sentences.tolist() == [0, 2, 3, 6, 8]
    assert [tokenizer.id_to_token(token) for token in text.tokens] == ["aa", "bb", "cc", "bb", "aa", "cc", "aa", "bb"]


def test_many_calls_give_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [[f"a{n} b", "c d e"] for n in range(10)]
    tokenizer = train_wordpiece(["a b c d e 0 1 2 3 4 5 6 7 8 9"] * 3, vocab_size=64)
    whole = tokenize_documents(documents, tokenizer, 10)
    monkeypatch.setattr("vpipe.data.text.flat._SENTENCES_PER_CALL", 3)
    parts = tokenize_documents(documents, tokenizer, 10)
    assert np.array_equal(whole.tokens, parts.tokens)
    assert np.array_equal(whole.sentences, parts.sentences)
    assert np.array_equal(whole.documents, parts.documents)
