from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from vpipe.data.text.vocabulary import SPECIAL_TOKENS, UNK
from vpipe.data.text.wordpiece import save_tokenizer, train_wordpiece

TEXTS = ["The lowest river runs lower than the newest, widest river.", "Newer rivers run wide; lower ones run low."] * 5


def _many_ties() -> list[str]:
    rng = random.Random(0)
    return [" ".join("".join(rng.choices("abcdefghij", k=6)) for _ in range(40)) for _ in range(20)]


@pytest.mark.parametrize("vocab_size", [64, 300])
def test_equal_texts_give_equal_tokenizers(vocab_size: int) -> None:
    # full of ties: the library's trainer alone gives another vocabulary nearly every time
    made = {train_wordpiece(_many_ties(), vocab_size=vocab_size).to_str() for _ in range(4)}
    assert len(made) == 1


def test_special_tokens_come_first() -> None:
    tokenizer = train_wordpiece(TEXTS, vocab_size=100)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]


def test_words_are_learned_and_pairs_marked() -> None:
    tokenizer = train_wordpiece(TEXTS, vocab_size=100)
    encoded = tokenizer.encode("the river", "runs")
    assert encoded.tokens[:4] == ["[CLS]", "the", "river", "[SEP]"]
    assert encoded.type_ids[:4] == [0, 0, 0, 0]
    assert encoded.type_ids[4:] == [1] * (len(encoded.ids) - 4)
    assert tokenizer.decode(encoded.ids) == "the river runs"


def test_continuations_in_a_text_are_no_special_tokens() -> None:
    tokenizer = train_wordpiece(TEXTS, vocab_size=100)
    tokens = tokenizer.encode("##r", add_special_tokens=False).tokens
    assert "##r" not in tokens


def test_capitals_and_accents() -> None:
    texts = ["Café Über Straße"] * 3
    lower = train_wordpiece(texts, vocab_size=100)
    cased = train_wordpiece(texts, vocab_size=100, lowercase=False)
    assert "cafe" in lower.get_vocab()
    assert "Café" in cased.get_vocab()


@pytest.mark.parametrize(("limit", "vocab_size"), [(3, 100), (9000, 8)])
def test_the_most_frequent_characters_are_kept(limit: int, vocab_size: int) -> None:
    tokenizer = train_wordpiece(["山山山山 水水水 月月 花 風"], vocab_size=vocab_size, limit_alphabet=limit)
    assert set(tokenizer.get_vocab()) == {*SPECIAL_TOKENS, "山", "水", "月"}
    assert UNK in tokenizer.encode("山花").ids


@pytest.mark.parametrize("vocab_size", [5, 6, 20, 64])
def test_the_vocabulary_is_never_too_large(vocab_size: int) -> None:
    assert train_wordpiece(TEXTS, vocab_size=vocab_size).get_vocab_size() <= vocab_size


def test_saved_files(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(TEXTS, vocab_size=100)
    whole, words = save_tokenizer(tokenizer, tmp_path)
    assert Tokenizer.from_file(str(whole)).encode("lowest river").ids == tokenizer.encode("lowest river").ids
    lines = words.read_text(encoding="utf-8").splitlines()
    assert lines == [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
