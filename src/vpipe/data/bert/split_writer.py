"""One split of a BERT set: its documents tokenized, paired, masked and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from vpipe.data.bert.masking import mask_tokens
from vpipe.data.bert.meta import MASK_STREAMS, BertOptions, Split, SplitMeta
from vpipe.data.bert.pairs import NUM_MARKERS, build_pairs, pair_rows
from vpipe.data.draws import Stream
from vpipe.data.order import shuffled
from vpipe.data.progress import Progress
from vpipe.data.store import ArrayWriter, StoredFile
from vpipe.data.text.flat import FlatText, tokenize_documents
from vpipe.data.text.vocabulary import UNK
from vpipe.errors import DataError

__all__ = ["SplitWriter"]

_TOKENS_PER_WRITE = 1 << 18
_NAMES: dict[Split, str] = {"train": "training", "eval": "evaluation"}
_PAIRS: dict[Split, Stream] = {"train": Stream.PAIRS_TRAIN, "eval": Stream.PAIRS_EVAL}
_SHUFFLE: dict[Split, Stream] = {"train": Stream.SHUFFLE_TRAIN, "eval": Stream.SHUFFLE_EVAL}


class SplitWriter:
    """Turns the documents of a split into arrays under `root`."""

    def __init__(self, root: Path, tokenizer: Tokenizer, options: BertOptions, progress: Progress) -> None:
        self._root = root
        self._tokenizer = tokenizer
        self._options = options
        self._progress = progress
        self._vocab_size: int = tokenizer.get_vocab_size()

    def write(self, split: Split, documents: Sequence[Sequence[str]]) -> SplitMeta:
        """Write one split, its samples in random order, and describe it.

        Raises:
            DataError: the documents hold too little text for a single pair.
        """
        options, name = self._options, _NAMES[split]
        text = self._tokenize(documents, name)
        pairs = np.zeros((0, 5), dtype=np.int64)
        if text.num_documents > 1:
            pairs = build_pairs(
                text,
                options.sequence_length,
                seed=options.seed,
                stream=_PAIRS[split],
                num_passes=options.num_passes,
                progress=self._progress,
                step=f"pair {name} sentences",
            )
        if not len(pairs):
            raise DataError(f"the {len(documents)} {name} documents are too short to make a pair; give more text")
        pairs = pairs[shuffled(options.seed, _SHUFFLE[split], len(pairs))[: options.limit_samples]]
        sizes = (pairs[:, 1] - pairs[:, 0]) + (pairs[:, 3] - pairs[:, 2]) + NUM_MARKERS
        return SplitMeta(
            num_documents=len(documents),
            num_samples=len(pairs),
            num_tokens=int(sizes.sum()),
            num_random_next=int(pairs[:, 4].sum()),
            unknown_share=round(float(np.mean(text.tokens == UNK)), 6),
            arrays=self._write_arrays(split, text, pairs),
        )

    def _tokenize(self, documents: Sequence[Sequence[str]], name: str) -> FlatText:
        self._tokenizer.encode_special_tokens = True  # a "[SEP]" in the text is text
        try:
            limit = self._options.sequence_length - NUM_MARKERS
            return tokenize_documents(documents, self._tokenizer, limit, self._progress, f"tokenize {name} text")
        finally:
            self._tokenizer.encode_special_tokens = False

    def _write_arrays(self, split: Split, text: FlatText, pairs: NDArray[np.int64]) -> dict[str, StoredFile]:
        """Write block after block, so that memory does not grow with the number of samples."""
        (self._root / split).mkdir()
        writers: dict[str, ArrayWriter] = {}
        rows_per_write = max(1, _TOKENS_PER_WRITE // self._options.sequence_length)
        for start in range(0, len(pairs), rows_per_write):
            self._progress(f"write {_NAMES[split]} samples", start, len(pairs))
            rows = np.arange(start, min(start + rows_per_write, len(pairs)))
            for name, block in self._block(split, text, pairs[rows], rows).items():
                if name not in writers:
                    writers[name] = ArrayWriter(self._root / split / f"{name}.npy", len(pairs), block)
                writers[name].add(block)
        self._progress(f"write {_NAMES[split]} samples", len(pairs), len(pairs))
        return {name: writer.close(self._root) for name, writer in writers.items()}

    def _block(
        self, split: Split, text: FlatText, pairs: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> dict[str, NDArray[np.generic]]:
        """Return the arrays' rows, in the smallest types that hold them."""
        tokens, spans = pair_rows(text.tokens, pairs, self._options.sequence_length)
        common: dict[str, NDArray[np.generic]] = {
            "spans": spans.astype(np.int32),
            "next_sentence_label": pairs[:, 4].astype(np.int8),
        }
        id_type = np.uint16 if self._vocab_size <= 1 << 16 else np.int32
        if self._options.masking == "dynamic":
            return {"tokens": tokens.astype(id_type), **common}
        input_ids, labels = mask_tokens(
            tokens, rows, vocab_size=self._vocab_size, seed=self._options.seed, stream=MASK_STREAMS[split]
        )
        label_type = np.int16 if self._vocab_size <= 1 << 15 else np.int32
        return {"input_ids": input_ids.astype(id_type), "labels": labels.astype(label_type), **common}
