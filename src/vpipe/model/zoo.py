"""The model that a run's config asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from vpipe.config.entry import load_entry
from vpipe.config.sections import ModelConfig
from vpipe.errors import ModelError
from vpipe.model.chain import Chain
from vpipe.model.rng import seeding_user_code

if TYPE_CHECKING:
    from transformers import BertConfig, PreTrainedConfig

__all__ = ["bert_config_of", "build_chain", "transformers_config_of"]


def build_chain(
    model: ModelConfig, *, seed: int = 0, data_vocab_size: int | None = None, directory: Path | str = "."
) -> Chain:
    """Return the chain that `model` describes; blocks hold no memory before they are materialised.

    `seed` decides what an entry function draws, such as the weights of the modules that it makes. `data_vocab_size` is
    the vocabulary of the data, which a built-in model takes as its own unless the config gives one. A relative `entry`
    file is looked for in `directory`.

    Raises:
        ModelError: sizes that make no such model, weights in `init_from` that do not fit, or an entry that cannot be
            imported, fails or returns something else than a chain.
    """
    if model.type == "bert":
        from vpipe.model.families.bert import build_bert_chain

        chain = build_bert_chain(bert_config_of(model, data_vocab_size), tie_weights=model.tie_weights)
    elif model.type == "gpt":
        from vpipe.model.families.decoder_config import gpt_config_of
        from vpipe.model.families.gpt import build_gpt_chain

        return build_gpt_chain(gpt_config_of(model, data_vocab_size), tie_weights=model.tie_weights)
    elif model.type == "llama":
        from vpipe.model.families.decoder_config import llama_config_of
        from vpipe.model.families.llama import build_llama_chain

        return build_llama_chain(llama_config_of(model, data_vocab_size), tie_weights=model.tie_weights)
    elif model.type == "custom":
        chain = _build_custom(model, seed, directory)
    else:
        raise ModelError(f"model.type '{model.type}' is not one of bert, gpt, llama, custom")
    if model.init_from is None:
        return chain
    from vpipe.model.pretrained import initialise_from

    return initialise_from(chain, model.init_from)


def transformers_config_of(model: ModelConfig, data_vocab_size: int | None = None) -> PreTrainedConfig | None:
    """Return transformers' configuration of the model; None for a custom one.

    Raises:
        ModelError: sizes that make no such model.
    """
    from vpipe.model.families.decoder_config import gpt_config_of, llama_config_of

    makers = {"bert": bert_config_of, "gpt": gpt_config_of, "llama": llama_config_of}
    return makers[model.type](model, data_vocab_size) if model.type in makers else None


def bert_config_of(model: ModelConfig, data_vocab_size: int | None = None) -> BertConfig:
    """Return transformers' configuration of the BERT that `model` describes.

    With `init_from` it is that of the directory, with the dropout of `model`.

    Raises:
        ModelError: sizes that make no BERT or are not those of `init_from`, or a vocabulary smaller than the data's.
    """
    from vpipe.model.families.bert_config import build_bert_config
    from vpipe.model.families.decoder_config import check_vocabulary

    ratios = {"dropout": model.dropout, "attention_dropout": model.attention_dropout}
    if model.init_from is not None:
        base = _read_config(model.init_from)
        _check_same_sizes(model, base)
        config = build_bert_config(base=base, **ratios)
    else:
        config = build_bert_config(
            hidden_size=model.hidden_size,
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            intermediate_size=model.intermediate_size,
            vocab_size=data_vocab_size if model.vocab_size is None else model.vocab_size,
            max_position_embeddings=model.max_position_embeddings,
            **ratios,
        )
    check_vocabulary(config.vocab_size, data_vocab_size)
    return config


def _check_same_sizes(model: ModelConfig, base: BertConfig) -> None:
    """Refuse sizes that are not those of the weights: the plan counts blocks by the config."""
    theirs = {
        "hidden_size": base.hidden_size,
        "num_layers": base.num_hidden_layers,
        "num_heads": base.num_attention_heads,
        "intermediate_size": base.intermediate_size,
        "max_position_embeddings": base.max_position_embeddings,
    }
    if model.vocab_size is not None:
        theirs["vocab_size"] = base.vocab_size
    wrong = {name: value for name, value in theirs.items() if value != getattr(model, name)}
    if wrong:
        differences = ", ".join(f"{name} {value} and not {getattr(model, name)}" for name, value in wrong.items())
        fix = ", ".join(f"model.{name}: {value}" for name, value in wrong.items())
        raise ModelError(f"the model in '{model.init_from}' has {differences}; set {fix}")


def _read_config(directory: Path) -> BertConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import BertConfig

    path = directory / "config.json"
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ModelError(f"model.init_from needs a transformers directory with a config.json: {error}") from error
    if content.get("model_type") != "bert":
        raise ModelError(f"'{path}' describes a model of type {content.get('model_type')!r}; this needs 'bert'")
    try:
        return BertConfig.from_dict(content)
    except StrictDataclassError as error:
        raise ModelError(f"'{path}' describes no BERT: {' '.join(str(error).split())}; correct it") from error


def _build_custom(model: ModelConfig, seed: int, directory: Path | str) -> Chain:
    if model.entry is None:
        raise ModelError("model.type 'custom' needs model.entry: 'file.py:function' or 'package.module:function'")
    with seeding_user_code(seed, "import"):  # of its own: a process imports a file once, and may call it again
        function = load_entry("model.entry", model.entry, directory)
    try:
        with seeding_user_code(seed, "model.entry"):
            chain = function(**model.options)
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"model.entry '{model.entry}' failed: {type(error).__name__}: {error}") from error
    if isinstance(chain, Chain):
        return chain
    hint = "; wrap it: Chain.from_modules(modules, loss)" if isinstance(chain, nn.Module | list | tuple) else ""
    raise ModelError(f"model.entry '{model.entry}' returned {type(chain).__name__}, not a vpipe Chain{hint}")
