"""Any set of BERT's form as text for models that predict the next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vpipe.data.bert.masking import IGNORED
from vpipe.data.source import BatchSource, FieldSpec, Indices, check_fields

__all__ = ["CausalSource"]

_READ = ("input_ids", "labels", "attention_mask")


class CausalSource(BatchSource):
    """The samples of `source` without masks: `input_ids` are the text's tokens, and `labels` the same tokens.

    Padding has the label -100. A loss over these labels looks one token ahead, as that of the decoders does.
    """

    def __init__(self, source: BatchSource) -> None:
        self._source = source

    @property
    def fields(self) -> Mapping[str, FieldSpec]:
        """Describe the fields."""
        known = self._source.fields
        return {name: known[name] for name in ("input_ids", "labels")}

    @property
    def num_samples(self) -> int:
        """Count the samples."""
        return self._source.num_samples

    def batch(self, indices: Indices, fields: Sequence[str], *, epoch: int = 0) -> dict[str, Tensor]:
        """Return `fields` of the samples `indices`, the same in every epoch."""
        check_fields(self.fields, fields)
        if not fields:
            return {}
        masked = self._source.batch(indices, _READ, epoch=epoch)
        tokens = torch.where(masked["labels"] == IGNORED, masked["input_ids"], masked["labels"])
        known = {"input_ids": tokens, "labels": torch.where(masked["attention_mask"] == 1, tokens, IGNORED)}
        return {name: known[name] for name in fields}
