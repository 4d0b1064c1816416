"""Read a prepared BERT set: memory-mapped, only the rows and fields asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpipe.data.bert.masking import IGNORED, mask_tokens
from vpipe.data.bert.meta import MASK_STREAMS, BertMeta, Masking, Split, read_meta
from vpipe.data.source import BatchSource, FieldSpec, Indices, check_fields, row_numbers
from vpipe.data.store import check_file, open_array
from vpipe.errors import ConfigError, DataError

__all__ = ["BertDataset", "bert_fields", "open_bert"]


def bert_fields(sequence_length: int) -> dict[str, FieldSpec]:
    """Describe the fields of BERT's pre-training, named as transformers' `BertForPreTraining` takes them.

    `labels` are token ids where there is a target and -100 elsewhere; `next_sentence_label` is 0 where the second
    segment follows the first in the text and 1 where it is a random one; `attention_mask` is 0 on padding.
    """
    per_token = FieldSpec((sequence_length,), torch.int64)
    names = ("input_ids", "token_type_ids", "attention_mask", "labels")
    return {**dict.fromkeys(names, per_token), "next_sentence_label": FieldSpec((), torch.int64)}


def open_bert(
    directory: str | Path,
    split: Split = "train",
    *,
    masking: Masking | None = None,
    seed: int | None = None,
    sequence_length: int | None = None,
    vocab_size: int | None = None,
    verify: bool = False,
) -> BertDataset:
    """Open one split of a set that `vpipe data prepare bert` wrote.

    `masking` is as prepared where it is None; either kind of set can be read either way. `seed` draws the masks of
    dynamic masking, by default the seed of the preparation. `sequence_length` and `vocab_size` are what the model
    expects; a vocabulary smaller than the model's is fine. `verify` compares the content of all files to their
    fingerprints, else only sizes are compared.

    Raises:
        DataError: missing, truncated, damaged or not what the model expects; the message has the command that helps.
    """
    directory = Path(directory)
    meta = read_meta(directory)
    if split not in meta.splits:
        command = meta.command(directory, eval_fraction=0.1)
        raise DataError(
            f"{directory} was prepared with the splits {', '.join(meta.splits)}, without '{split}'; run `{command}`"
        )
    if sequence_length is not None and sequence_length != meta.options.sequence_length:
        raise DataError(
            f"{directory} was prepared with sequences of {meta.options.sequence_length} tokens, the run expects "
            f"{sequence_length}; set data.sequence_length: {meta.options.sequence_length}"
            f"{_or_prepare(meta, directory, sequence_length=sequence_length)}"
        )
    if vocab_size is not None and vocab_size < meta.vocab_size:
        raise DataError(
            f"{directory} has a vocabulary of {meta.vocab_size} tokens, the model's has {vocab_size}; "
            f"set model.vocab_size: {meta.vocab_size} (or null){_or_prepare(meta, directory, vocab_size=vocab_size)}"
        )
    for stored in meta.files():
        check_file(directory, stored, _fix(meta, directory), verify=verify)
    return BertDataset(
        directory, meta, split, masking or meta.options.masking, meta.options.seed if seed is None else seed
    )


def _or_prepare(meta: BertMeta, directory: Path, **changes: int) -> str:
    """Return the other way out, where sets can be prepared so."""
    try:
        return f", or run `{meta.command(directory, **changes)}`"
    except ConfigError:
        return ""


class BertDataset(BatchSource):
    """One split of a prepared set; open it with `open_bert`.

    The evaluation split is always masked statically, so that losses of different epochs and runs compare. Static
    masking of a sample equals the dynamic one of epoch 0 with the seed of the preparation.
    """

    def __init__(self, directory: Path, meta: BertMeta, split: Split, masking: Masking, seed: int) -> None:
        self.meta = meta
        self.split = split
        self._directory = directory
        self.masking: Masking = "static" if split == "eval" else masking
        self._seed = seed if self.masking == "dynamic" else meta.options.seed
        self._stored = meta.splits[split].arrays
        self._arrays: dict[str, NDArray[np.generic]] = {
            name: open_array(directory, stored, _fix(meta, directory)) for name, stored in self._stored.items()
        }

    @property
    def num_samples(self) -> int:
        """Count the samples."""
        return self.meta.splits[self.split].num_samples

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        """Describe the fields, see `bert_fields`."""
        return bert_fields(self.meta.options.sequence_length)

    def batch(self, indices: Indices, fields: Sequence[str], *, epoch: int = 0) -> dict[str, Tensor]:
        """Return `fields` of the samples `indices`; with dynamic masking, as they are in `epoch`.

        Raises:
            DataError: a field or sample that is not there, or a value that the set cannot have: its file is damaged.
        """
        check_fields(self.fields, fields)
        rows = row_numbers(indices, self.num_samples)
        found: dict[str, NDArray[np.int64]] = {}
        if wanted := {"input_ids", "labels"} & set(fields):
            found |= self._masked(rows, wanted, epoch)
        if {"token_type_ids", "attention_mask"} & set(fields):
            found |= segment_masks(self._read("spans", rows), self.meta.options.sequence_length)
        if "next_sentence_label" in fields:
            found["next_sentence_label"] = self._read("next_sentence_label", rows)
        return {name: torch.from_numpy(found[name]) for name in fields}

    def _read(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        values = np.asarray(self._arrays[name][rows]).astype(np.int64)
        largest, why = self._largest(name)
        is_wrong = (values < 0) | (values > largest)
        if name == "labels":
            is_wrong &= values != IGNORED
        if is_wrong.any():
            first = tuple(np.argwhere(is_wrong)[0])
            raise DataError(
                f"{self._directory / self._stored[name].file} is damaged: sample {rows[first[0]]} has the value "
                f"{values[first]}, and {why}, so 0 to {largest} can be there; {_fix(self.meta, self._directory)}"
            )
        return values

    def _largest(self, name: str) -> tuple[int, str]:
        """Return the largest value that a stored array can have, and why."""
        if name == "spans":
            return self.meta.options.sequence_length, f"sequences have {self.meta.options.sequence_length} tokens"
        if name == "next_sentence_label":
            return 1, "a second segment is the next one or is not"
        return self.meta.vocab_size - 1, f"the vocabulary has {self.meta.vocab_size} tokens"

    def _masked(self, rows: NDArray[np.int64], wanted: set[str], epoch: int) -> dict[str, NDArray[np.int64]]:
        stored_static = "labels" in self._stored
        if stored_static and self.masking == "static":
            return {name: self._read(name, rows) for name in wanted}
        if stored_static:
            labels = self._read("labels", rows)
            tokens = np.where(labels == IGNORED, self._read("input_ids", rows), labels)
        else:
            tokens = self._read("tokens", rows)
        input_ids, labels = mask_tokens(
            tokens,
            rows,
            vocab_size=self.meta.vocab_size,
            seed=self._seed,
            stream=MASK_STREAMS[self.split],
            epoch=epoch if self.masking == "dynamic" else 0,
        )
        return {"input_ids": input_ids, "labels": labels}


def segment_masks(spans: NDArray[np.int64], sequence_length: int) -> dict[str, NDArray[np.int64]]:
    """Return `token_type_ids` and `attention_mask` from where each sample's two segments end, see `pair_rows`."""
    position = np.arange(sequence_length)[None, :]
    first, last = spans[:, :1], spans[:, 1:]
    return {
        "token_type_ids": ((position >= first) & (position < last)).astype(np.int64),
        "attention_mask": (position < last).astype(np.int64),
    }


def _fix(meta: BertMeta, directory: Path) -> str:
    return f"prepare it again with `{meta.command(directory)}`"
