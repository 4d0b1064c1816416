"""The loss of models that predict each token from those before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["IGNORED_LABEL", "CausalLoss"]

IGNORED_LABEL = -100


@dataclass(frozen=True)
class CausalLoss:
    """Mean cross entropy over the batch's tokens, each predicted from those before it in its sample.

    `labels` of shape (samples, tokens) are the tokens themselves, as transformers has it: the loss looks one ahead, so
    each sample's first token is no target. -100 is no target either.
    """

    inputs: tuple[str, ...] = ("logits", "labels")
    parts: tuple[str, ...] = ("token",)

    def count(self, fields: Mapping[str, Tensor], num_samples: int) -> dict[str, float]:
        """Count the tokens that are predicted."""
        return {"token": float(fields["labels"][:, 1:].ne(IGNORED_LABEL).sum())}

    def __call__(
        self, tensors: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        """Return this microbatch's share; a batch without targets has a loss of zero."""
        labels = nn.functional.pad(tensors["labels"].long(), (0, 1), value=IGNORED_LABEL)[:, 1:]
        logits = tensors["logits"].float().flatten(0, 1)
        total = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum")
        return {"token": total / max(totals["token"], 1.0)}
