"""The two losses of BERT's pre-training: masked tokens and next sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["IGNORED_LABEL", "BertLoss", "target_positions"]

IGNORED_LABEL = -100


def target_positions(labels: Tensor) -> Tensor:
    """Return where labels of shape (samples, tokens) are targets, as indices into the flattened labels."""
    return labels.flatten().ne(IGNORED_LABEL).nonzero().squeeze(1)


@dataclass(frozen=True)
class BertLoss:
    """Mean cross entropy over the batch's masked tokens (`mlm`), and over its samples' next-sentence labels (`nsp`).

    `mlm_logits` holds one row for each target, in the order of the flattened labels.
    """

    inputs: tuple[str, ...] = ("mlm_logits", "nsp_logits", "labels", "next_sentence_label")
    parts: tuple[str, ...] = ("mlm", "nsp")

    def count(self, fields: Mapping[str, Tensor], num_samples: int) -> dict[str, float]:
        """Count masked tokens and samples."""
        return {"mlm": float(fields["labels"].ne(IGNORED_LABEL).sum()), "nsp": float(num_samples)}

    def __call__(
        self, tensors: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        """Return this microbatch's share of both parts; a batch without targets has an `mlm` of zero."""
        labels = tensors["labels"].flatten()
        targets = labels.index_select(0, target_positions(labels)).long()
        mlm = nn.functional.cross_entropy(tensors["mlm_logits"].float(), targets, reduction="sum")
        following = tensors["next_sentence_label"].flatten().long()
        nsp = nn.functional.cross_entropy(tensors["nsp_logits"].float(), following, reduction="sum")
        return {"mlm": mlm / max(totals["mlm"], 1.0), "nsp": nsp / totals["nsp"]}
