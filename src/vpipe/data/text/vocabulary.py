"""The five tokens that every BERT vocabulary starts with, in this order."""

from __future__ import annotations

__all__ = ["CLS", "MASK", "NUM_SPECIAL", "PAD", "SEP", "SPECIAL_TOKENS", "UNK"]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD, UNK, CLS, SEP, MASK = range(len(SPECIAL_TOKENS))
NUM_SPECIAL = len(SPECIAL_TOKENS)
