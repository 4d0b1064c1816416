"""Tokenized documents as one long array of token ids: a stretch of text is then a pair of positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vpipe.data.progress import Progress, no_progress

__all__ = ["FlatText", "tokenize_documents"]

_SENTENCES_PER_CALL = 20_000


@dataclass(frozen=True)
class FlatText:
    """Token ids of all documents, one after another.

    Sentence i is `tokens[sentences[i]:sentences[i + 1]]`; document j is the sentences from `documents[j]` up to
    `documents[j + 1]`. No sentence and no document is empty.
    """

    tokens: NDArray[np.int32]
    sentences: NDArray[np.int64]
    documents: NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        """Count the documents."""
        return len(self.documents) - 1


def tokenize_documents(
    documents: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    max_sentence: int,
    progress: Progress = no_progress,
    step: str = "tokenize",
) -> FlatText:
    """Tokenize documents given as sentences; a sentence of more than `max_sentence` tokens becomes several.

    Sentences and documents without a token are left out.
    """
    chunks: list[NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)]
    sizes: list[int] = []
    counts = np.zeros(len(documents), dtype=np.int64)
    owners = (number for number, document in enumerate(documents) for _ in document)
    sentences = chain.from_iterable(documents)
    done, total = 0, sum(len(document) for document in documents)
    while batch := list(islice(sentences, _SENTENCES_PER_CALL)):
        progress(step, done, total)
        ids: list[int] = []
        for encoding, owner in zip(tokenizer.encode_batch(batch, add_special_tokens=False), owners, strict=False):
            ids += encoding.ids
            pieces = _piece_sizes(len(encoding.ids), max_sentence)
            sizes += pieces
            counts[owner] += len(pieces)
        chunks.append(np.array(ids, dtype=np.int32))
        done += len(batch)
    progress(step, total, total)
    return FlatText(np.concatenate(chunks), _offsets(sizes), _offsets(counts[counts > 0]))


def _piece_sizes(size: int, limit: int) -> list[int]:
    full, rest = divmod(size, limit)
    return [limit] * full + [rest] * (rest > 0)


def _offsets(sizes: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.asarray(sizes, dtype=np.int64))])
