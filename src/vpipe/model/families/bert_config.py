"""The sizes of a BERT, as transformers' configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import BertConfig

from vpipe.config.model_sizes import BERT_SIZES
from vpipe.errors import ModelError

__all__ = ["build_bert_config", "check_bert_config"]

# Our names on the left: those of the run's YAML.
_NAMES = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
_RATIOS = ("dropout", "attention_dropout")


def build_bert_config(
    size: str | None = None, /, *, base: BertConfig | None = None, **overrides: float | None
) -> BertConfig:
    """Return the published BERT `size` ('tiny', 'base' or 'large') with `overrides` in place of its numbers.

    Overrides are `hidden_size`, `num_layers`, `num_heads`, `intermediate_size`, `vocab_size`,
    `max_position_embeddings`, `dropout` and `attention_dropout`; None leaves a number alone. Without `size` it starts
    from `base`, or from transformers' defaults (BERT-base).

    Raises:
        ModelError: an unknown size or override, or numbers that make no BERT.
    """
    if size is not None and size not in BERT_SIZES:
        raise ModelError(f"size '{size}' is not one of {', '.join(BERT_SIZES)}")
    if unknown := sorted(set(overrides) - set(_NAMES)):
        raise ModelError(f"BERT has no setting '{unknown[0]}'; it has {', '.join(_NAMES)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    settings: dict[str, float] = {**(BERT_SIZES[size] if size is not None else {}), **given}
    known = base.to_dict() if base is not None else {}
    merged = known | {_NAMES[name]: value for name, value in settings.items()}
    if reasons := check_bert_config(merged):
        raise ModelError("; ".join(reasons))
    return BertConfig.from_dict(merged)


def check_bert_config(settings: Mapping[str, Any]) -> list[str]:
    """Return what makes transformers' `settings` no BERT; settings that are not given are fine."""
    reasons = []
    for name, theirs in _NAMES.items():
        if theirs not in settings:
            continue
        value = settings[theirs]
        if name in _RATIOS and not 0 <= value < 1:
            reasons.append(f"{name} is {value}, it must be at least 0 and below 1")
        if name not in _RATIOS and not (isinstance(value, int) and value > 0):
            reasons.append(f"{name} is {value}, it must be a whole number of at least 1")
    hidden, heads = settings.get("hidden_size", 768), settings.get("num_attention_heads", 12)
    if not reasons and hidden % heads:
        below = int(hidden // heads * heads)
        near = f"{below} or {below + int(heads)}" if below else str(heads)
        reasons.append(f"hidden_size {hidden} is not a multiple of num_heads {heads}; take hidden_size {near}")
    return reasons
