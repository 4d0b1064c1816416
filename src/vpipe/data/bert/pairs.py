"""Sentence pairs for next-sentence prediction.

Source: Devlin et al., "BERT", appendix A.2, and the `create_pretraining_data.py` that came with it. Done differently
here, so that nothing but the text itself tells true pairs from random ones: a random second segment is about as long as
the text it stands for; a pair that is too long loses the beginning of the first segment and the end of the second, so
that what meets in the middle stays; a sentence that stands alone is cut in its middle, for true and for random pairs
(the original makes all of these random).
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right

import numpy as np
from numpy.typing import NDArray

from vpipe.data.draws import Stream
from vpipe.data.progress import Progress, no_progress
from vpipe.data.text.flat import FlatText
from vpipe.data.text.vocabulary import CLS, PAD, SEP

__all__ = ["NUM_MARKERS", "build_pairs", "pair_rows"]

NUM_MARKERS = 3  # [CLS] and two [SEP]
SHORT_SHARE = 0.1
RANDOM_SHARE = 0.5

_Span = tuple[int, int]


def build_pairs(
    text: FlatText,
    sequence_length: int,
    *,
    seed: int,
    stream: Stream,
    num_passes: int = 1,
    progress: Progress = no_progress,
    step: str = "pair",
) -> NDArray[np.int64]:
    """Return pairs as rows (start of A, end of A, start of B, end of B, 1 if B is random else 0), in text order.

    Positions are those of `text.tokens`. Each pass goes over all documents with other choices; one pair in ten aims at
    a random shorter length. The text needs two documents or more.
    """
    rows: list[tuple[int, ...]] = []
    for number in range(num_passes):
        maker = _PairMaker(text, sequence_length - NUM_MARKERS, random.Random(f"{seed}/{stream.name}/{number}"))
        for document in range(text.num_documents):
            if document % 1000 == 0:
                progress(step, number * text.num_documents + document, num_passes * text.num_documents)
            maker.add_document(document)
        rows += maker.rows
    progress(step, num_passes * text.num_documents, num_passes * text.num_documents)
    return np.array(rows, dtype=np.int64).reshape(-1, 5)


def pair_rows(
    tokens: NDArray[np.int32], pairs: NDArray[np.int64], sequence_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lay out pairs as `[CLS] A [SEP] B [SEP]` and padding: (token ids, shape (pairs, sequence length); spans).

    Spans have shape (pairs, 2): the number of tokens up to the first [SEP], and up to the second, both included.
    """
    first_start, first_end, second_start, second_end, _ = (column[:, None] for column in pairs.T)
    middle = first_end - first_start + 1  # where the first [SEP] stands
    last = middle + second_end - second_start + 1
    position = np.arange(sequence_length)[None, :]
    source = np.where(position < middle, first_start + position - 1, second_start + position - middle - 1)
    ids = tokens[np.clip(source, 0, len(tokens) - 1)].astype(np.int64)
    ids[np.broadcast_to(position == 0, ids.shape)] = CLS
    ids[(position == middle) | (position == last)] = SEP
    ids[position > last] = PAD
    return ids, np.concatenate([middle, last], axis=1) + 1


class _PairMaker:
    """Walks over documents and collects pairs of at most `room` tokens."""

    def __init__(self, text: FlatText, room: int, rng: random.Random) -> None:
        self.rows: list[tuple[int, ...]] = []
        self._sentences: list[int] = text.sentences.tolist()
        self._documents: list[int] = text.documents.tolist()
        self._room = room
        self._rng = rng

    def add_document(self, document: int) -> None:
        """Cut a document into chunks of about a sequence, and each chunk into a pair."""
        start, end = self._documents[document : document + 2]
        while start < end:
            target = self._room if self._rng.random() >= SHORT_SHARE else self._rng.randint(2, self._room)
            stop = bisect_left(self._sentences, self._sentences[start] + target, start + 1, end)
            start = self._add_chunk(document, start, stop) if stop - start > 1 else self._add_lone(document, start)

    def _add_chunk(self, document: int, start: int, stop: int) -> int:
        """Pair the sentences `start` to `stop - 1`; return the first sentence that was not used."""
        cut = self._rng.randint(start + 1, stop - 1)
        first, second = self._span(start, cut), self._span(cut, stop)
        if self._rng.random() >= RANDOM_SHARE:
            self._add(first, second, 0)
            return stop
        self._add(first, self._random_stretch(document, second[1] - second[0]), 1)
        return cut

    def _add_lone(self, document: int, sentence: int) -> int:
        """Pair the halves of one sentence, or its first half with another sentence's second."""
        begin, end = self._span(sentence, sentence + 1)
        if end - begin > 1:
            middle = (begin + end) // 2
            if self._rng.random() >= RANDOM_SHARE:
                self._add((begin, middle), (middle, end), 0)
            else:
                begin_other, end_other = self._span(*self._random_sentence(document))
                self._add((begin, middle), ((begin_other + end_other) // 2, end_other), 1)
        return sentence + 1

    def _random_stretch(self, document: int, length: int) -> _Span:
        """Return consecutive sentences of another document, of at least `length` tokens where it has so many."""
        begin, _ = self._random_sentence(document)
        other = bisect_right(self._documents, begin)
        start, end = self._documents[other - 1], self._documents[other]
        latest = bisect_right(self._sentences, self._sentences[end] - length, start, end) - 1
        begin = max(min(begin, latest), start)
        stop = bisect_left(self._sentences, self._sentences[begin] + length, begin + 1, end)
        return self._span(begin, stop)

    def _random_sentence(self, document: int) -> _Span:
        """Return a sentence of another document, as the range of its number; all sentences are equally likely."""
        start, end = self._documents[document : document + 2]
        sentence = self._rng.randrange(self._documents[-1] - (end - start))
        sentence += (end - start) * (sentence >= start)
        return sentence, sentence + 1

    def _span(self, start: int, stop: int) -> _Span:
        return self._sentences[start], self._sentences[stop]

    def _add(self, first: _Span, second: _Span, label: int) -> None:
        size_first, size_second = first[1] - first[0], second[1] - second[0]
        if size_first + size_second > self._room:  # shorten the longer one first
            size_first = min(size_first, max(self._room - size_second, (self._room + 1) // 2))
            size_second = min(size_second, self._room - size_first)
        self.rows.append((first[1] - size_first, first[1], second[0], second[0] + size_second, label))
