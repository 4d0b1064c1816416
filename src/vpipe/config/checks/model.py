"""Whether the numbers of a built-in model are those of its family."""

from __future__ import annotations

from collections.abc import Iterator

from vpipe.config.fields import show
from vpipe.config.model_sizes import MODEL_SIZES
from vpipe.config.problems import Problem
from vpipe.config.sections import ModelConfig
from vpipe.words.near import did_you_mean

__all__ = ["check_family"]


def check_family(model: ModelConfig) -> Iterator[Problem]:
    """Yield what is wrong with the keys that only some of the built-in models have."""
    sizes, of_type = MODEL_SIZES[model.type], f"model.type = '{model.type}'"
    if model.size is not None and model.size not in sizes:
        kind = next((kind for kind, known in MODEL_SIZES.items() if model.size in known), None)
        hint = f"; for that set model.type = '{kind}'" if kind else did_you_mean(model.size, sizes)
        text = (
            f"model.size = {show(model.size)} is not one of {', '.join(map(show, sizes))}, the sizes of {of_type}{hint}"
        )
        yield Problem(("model.size", "model.type"), text)
    if model.init_from is not None and model.type != "bert":
        text = f"model.init_from starts a BERT from weights, and {of_type}; leave it out"
        yield Problem(("model.init_from", "model.type"), text)
    kv_heads = model.num_kv_heads
    if kv_heads is not None and model.type != "llama":
        text = f"model.num_kv_heads = {kv_heads} needs model.type = 'llama', and {of_type}; leave it out"
        yield Problem(("model.num_kv_heads", "model.type"), text)
    elif kv_heads is not None and model.num_heads % kv_heads:
        text = f"model.num_kv_heads = {kv_heads} does not divide model.num_heads = {model.num_heads}; use a divisor"
        yield Problem(("model.num_kv_heads", "model.num_heads"), text)
    if model.type == "llama" and model.hidden_size // model.num_heads % 2 and not model.hidden_size % model.num_heads:
        text = (
            f"model.hidden_size = {model.hidden_size} makes model.num_heads = {model.num_heads} heads of "
            f"{model.hidden_size // model.num_heads}, and a llama's rotary positions need an even number; change one"
        )
        yield Problem(("model.num_heads", "model.hidden_size"), text)
    if model.type == "llama" and model.dropout:
        text = (
            f"model.dropout = {model.dropout:g} is not for a llama, which has dropout in attention only; leave it out"
        )
        yield Problem(("model.dropout", "model.type"), text)
