"""BERT's masking: 15 % of the tokens become targets, of which 80 % are hidden, 10 % replaced and 10 % left as they are.

Source: Devlin et al., "BERT", section 3.1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vpipe.data.draws import Stream, uniform_rows
from vpipe.data.text.vocabulary import MASK, NUM_SPECIAL

__all__ = ["IGNORED", "mask_tokens"]

IGNORED = -100
TARGET_SHARE = 0.15
MASKED_SHARE = 0.8
REPLACED_SHARE = 0.1


def mask_tokens(
    tokens: NDArray[np.int64], rows: NDArray[np.int64], *, vocab_size: int, seed: int, stream: Stream, epoch: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (input ids, labels) of samples `rows` whose token ids are `tokens`, shape (samples, sequence length).

    Labels are the original ids where there is a target and -100 elsewhere. Each sample gets the rounded 15 % of its
    ordinary tokens as targets, at least one. The result for a sample is a function of its tokens, its number and the
    keywords.
    """
    length = tokens.shape[1]
    scores, action, replacement = np.split(uniform_rows(seed, stream, epoch, rows, 3 * length), 3, axis=1)
    targets = _choose(scores, tokens >= NUM_SPECIAL)
    random_ids = NUM_SPECIAL + (replacement * (vocab_size - NUM_SPECIAL)).astype(np.int64)
    changed = np.where(action < MASKED_SHARE, MASK, random_ids)
    keep = ~targets | (action >= MASKED_SHARE + REPLACED_SHARE)
    return np.where(keep, tokens, changed), np.where(targets, tokens, IGNORED)


def _choose(scores: NDArray[np.float64], candidates: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark, in each row, the rounded 15 % of the candidates that have the lowest scores."""
    available = candidates.sum(axis=1)
    counts = np.minimum(np.maximum(np.floor(TARGET_SHARE * available + 0.5), 1), available)
    order = np.argsort(np.where(candidates, scores, 2.0), axis=1, kind="stable")
    chosen = np.zeros_like(candidates)
    np.put_along_axis(chosen, order, np.arange(candidates.shape[1])[None, :] < counts[:, None], axis=1)
    return chosen
