"""A WordPiece tokenizer from text, equal for equal text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from vpipe.data.text.vocabulary import NUM_SPECIAL, SPECIAL_TOKENS

__all__ = ["save_tokenizer", "train_wordpiece"]

_PREFIX = "##"


def train_wordpiece(
    texts: Sequence[str], *, vocab_size: int, limit_alphabet: int = 9000, lowercase: bool = True, min_frequency: int = 2
) -> Tokenizer:
    """Train BERT's tokenizer: at most `vocab_size` tokens, built on at most `limit_alphabet` different characters.

    Equal texts give an equal tokenizer. The library's own trainer does not promise that: it numbers the characters that
    continue a word (`##a`) in the order of a randomised hash table and breaks ties by these numbers. Therefore a first
    pass finds the characters, and the second gets them in sorted order.
    """
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    found = _train(texts, normalizer, special_tokens=SPECIAL_TOKENS)
    alphabet, continuing = _choose_alphabet(texts, normalizer, found, vocab_size - NUM_SPECIAL, limit_alphabet)
    vocab = _train(
        texts,
        normalizer,
        special_tokens=(*SPECIAL_TOKENS, *continuing),
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        min_frequency=min_frequency,
    )
    return _assemble(vocab, normalizer)


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> tuple[Path, Path]:
    """Write `tokenizer.json`, for the tokenizers library, and `vocab.txt`, for transformers' BertTokenizer."""
    whole, words = directory / "tokenizer.json", directory / "vocab.txt"
    whole.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words.write_text("".join(f"{token}\n" for token, _ in tokens), encoding="utf-8")
    return whole, words


def _train(
    texts: Sequence[str],
    normalizer: normalizers.Normalizer,
    *,
    special_tokens: Sequence[str],
    vocab_size: int = 0,
    initial_alphabet: Sequence[str] = (),
    limit_alphabet: int = 1 << 30,
    min_frequency: int = 0,
) -> dict[str, int]:
    """Return the vocabulary; with the defaults, the special tokens and all characters."""
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=list(special_tokens),
        limit_alphabet=limit_alphabet,
        initial_alphabet=list(initial_alphabet),
    )
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer.get_vocab()


def _choose_alphabet(
    texts: Sequence[str], normalizer: normalizers.Normalizer, found: dict[str, int], room: int, limit: int
) -> tuple[list[str], list[str]]:
    """Return the characters to keep, and those among them that also continue words, each sorted.

    The most frequent are kept, as many as `limit` and the vocabulary's `room` allow.
    """
    characters = [token for token in found if len(token) == 1]
    continuing = {token.removeprefix(_PREFIX) for token in found if len(token) == 3 and token.startswith(_PREFIX)}
    if len(characters) > limit or len(characters) + len(continuing) > room:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(normalizer.normalize_str(text))
        characters = sorted(characters, key=lambda character: (-counts[character], character))[:limit]
        sizes = [1 + (character in continuing) for character in characters]
        characters = characters[: sum(total <= room for total in accumulate(sizes))]
    return sorted(characters), sorted(_PREFIX + character for character in characters if character in continuing)


def _assemble(vocab: dict[str, int], normalizer: normalizers.Normalizer) -> Tokenizer:
    """Make the tokenizer anew: the one that was trained takes `##a` in a text for a special token."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix=_PREFIX)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer
