"""Random samples, for trying things and for measuring speed: nothing is stored, a sample is made from its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vpipe.data.bert.dataset import bert_fields, segment_masks
from vpipe.data.bert.masking import mask_tokens
from vpipe.data.bert.pairs import NUM_MARKERS, pair_rows
from vpipe.data.draws import Stream, uniform_rows
from vpipe.data.source import BatchSource, FieldSpec, Indices, check_fields, row_numbers
from vpipe.data.text.vocabulary import NUM_SPECIAL
from vpipe.errors import ConfigError

__all__ = ["SyntheticBertSource", "SyntheticSource"]

SHORT_SHARE = 0.1
_MIN_SEGMENTS = 2  # a token in each of the two segments


class SyntheticSource(BatchSource):
    """Random values for any fields: normal numbers for floating point types, whole numbers for others.

    `num_values` gives, by field, how many different whole numbers there are, such as the number of classes; 2 where it
    says nothing. The values of a sample depend on the seed, the place of the field among `fields` and the sample's
    number.

    Raises:
        ConfigError: no samples, or a name in `num_values` that is no field.
    """

    def __init__(
        self,
        fields: Mapping[str, FieldSpec],
        num_samples: int,
        *,
        seed: int = 0,
        num_values: Mapping[str, int] | None = None,
    ) -> None:
        _check_samples(num_samples)
        self._fields = dict(fields)
        self._num_samples = num_samples
        self._seed = seed
        self._num_values = dict(num_values or {})
        for name, count in self._num_values.items():
            if name not in self._fields or count < 1:
                raise ConfigError(
                    f"num_values has '{name}: {count}'; fields are {', '.join(fields)}, counts at least 1"
                )

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        """Describe the fields."""
        return self._fields

    @property
    def num_samples(self) -> int:
        """Count the samples."""
        return self._num_samples

    def batch(self, indices: Indices, fields: Sequence[str], *, epoch: int = 0) -> dict[str, Tensor]:
        """Return `fields` of the samples `indices`, the same in every epoch."""
        check_fields(self._fields, fields)
        rows = row_numbers(indices, self._num_samples)
        return {name: self._field(name, rows) for name in fields}

    def _field(self, name: str, rows: NDArray[np.int64]) -> Tensor:
        spec = self._fields[name]
        size = int(torch.Size(spec.shape_per_sample).numel())
        place = list(self._fields).index(name)
        draws = uniform_rows(self._seed, Stream.SYNTHETIC, place, rows, 2 * size)
        if spec.dtype.is_floating_point or spec.dtype.is_complex:
            radius = np.sqrt(-2 * np.log1p(-draws[:, :size]))  # Box-Muller
            values = radius * np.cos(2 * np.pi * draws[:, size:])
        else:
            values = np.floor(draws[:, :size] * self._num_values.get(name, 2))
        return torch.from_numpy(values).to(spec.dtype).reshape(spec.shape(len(rows)))


class SyntheticBertSource(BatchSource):
    """Random tokens in the form of BERT's pre-training, with its real masking and half the second segments "random".

    Low token ids are more frequent, as in text, so that a loss can fall a little; nothing else can be learned. One
    sample in ten is shorter than `sequence_length`. `dynamic` draws new masks in every epoch.

    Raises:
        ConfigError: no samples, a sequence too short for two segments, or a vocabulary of special tokens only.
    """

    def __init__(
        self, num_samples: int, *, sequence_length: int, vocab_size: int, seed: int = 0, dynamic: bool = False
    ) -> None:
        _check_samples(num_samples)
        if sequence_length < NUM_MARKERS + _MIN_SEGMENTS:
            raise ConfigError(
                f"data.sequence_length must be at least {NUM_MARKERS + _MIN_SEGMENTS} for BERT, got {sequence_length}"
            )
        if vocab_size <= NUM_SPECIAL:
            raise ConfigError(f"model.vocab_size must be above {NUM_SPECIAL}, the special tokens, got {vocab_size}")
        self._num_samples = num_samples
        self._length = sequence_length
        self._vocab_size = vocab_size
        self._seed = seed
        self._dynamic = dynamic

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        """Describe the fields, see `bert_fields`."""
        return bert_fields(self._length)

    @property
    def num_samples(self) -> int:
        """Count the samples."""
        return self._num_samples

    def batch(self, indices: Indices, fields: Sequence[str], *, epoch: int = 0) -> dict[str, Tensor]:
        """Return `fields` of the samples `indices`."""
        check_fields(self.fields, fields)
        rows = row_numbers(indices, self._num_samples)
        tokens, spans, random_next = self._samples(rows)
        found = {**segment_masks(spans, self._length), "next_sentence_label": random_next}
        if {"input_ids", "labels"} & set(fields):
            found["input_ids"], found["labels"] = mask_tokens(
                tokens,
                rows,
                vocab_size=self._vocab_size,
                seed=self._seed,
                stream=Stream.SYNTHETIC_MASK,
                epoch=epoch if self._dynamic else 0,
            )
        return {name: torch.from_numpy(found[name]) for name in fields}

    def _samples(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return tokens, spans (see `pair_rows`) and labels of the second segments."""
        room = self._length - NUM_MARKERS
        draws = uniform_rows(self._seed, Stream.SYNTHETIC, 0, rows, 2 * room + 4)
        ids = NUM_SPECIAL + (draws[:, :room] * draws[:, room:-4] * (self._vocab_size - NUM_SPECIAL)).astype(np.int64)
        short, length, cut, label = draws[:, -4:].T
        shorter = _MIN_SEGMENTS + (length * (room - _MIN_SEGMENTS + 1)).astype(np.int64)
        size = np.where(short < SHORT_SHARE, shorter, room)
        first = 1 + (cut * (size - 1)).astype(np.int64)
        begin = np.arange(len(rows)) * room
        random_next = (label < 0.5).astype(np.int64)
        pairs = np.stack([begin, begin + first, begin + first, begin + size, random_next], axis=1)
        tokens, spans = pair_rows(ids.astype(np.int32).reshape(-1), pairs, self._length)
        return tokens, spans, random_next


def _check_samples(num_samples: int) -> None:
    if num_samples < 1:
        raise ConfigError(f"data.synthetic_samples must be at least 1, got {num_samples}")
