"""The sizes of decoders, as transformers' configurations."""

from __future__ import annotations

from transformers import GPT2Config, LlamaConfig

from vpipe.config.sections import ModelConfig
from vpipe.errors import ModelError

__all__ = ["check_vocabulary", "gpt_config_of", "llama_config_of"]

_GPT_VOCABULARY = 50257
_LLAMA_VOCABULARY = 32000


def gpt_config_of(model: ModelConfig, data_vocab_size: int | None = None) -> GPT2Config:
    """Return transformers' configuration of the GPT that `model` describes.

    Raises:
        ModelError: heads that do not divide the width, or a vocabulary smaller than the data's.
    """
    _check_heads(model)
    return GPT2Config(
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_heads,
        n_inner=model.intermediate_size,
        n_positions=model.max_position_embeddings,
        vocab_size=_vocabulary(model, data_vocab_size, _GPT_VOCABULARY),
        embd_pdrop=model.dropout,
        resid_pdrop=model.dropout,
        attn_pdrop=model.attention_dropout,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own gelu_new is the same in many operations
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )


def llama_config_of(model: ModelConfig, data_vocab_size: int | None = None) -> LlamaConfig:
    """Return transformers' configuration of the Llama that `model` describes.

    Raises:
        ModelError: heads that do not divide the width, or a vocabulary smaller than the data's.
    """
    _check_heads(model)
    return LlamaConfig(
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        intermediate_size=model.intermediate_size,
        max_position_embeddings=model.max_position_embeddings,
        vocab_size=_vocabulary(model, data_vocab_size, _LLAMA_VOCABULARY),
        attention_dropout=model.attention_dropout,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )


def check_vocabulary(vocab_size: int, data_vocab_size: int | None) -> None:
    """Raise unless a model's vocabulary holds the data's.

    Raises:
        ModelError: it is smaller.
    """
    if data_vocab_size is not None and vocab_size < data_vocab_size:
        raise ModelError(
            f"the data uses {data_vocab_size} tokens and the model knows {vocab_size}; set model.vocab_size to "
            f"at least {data_vocab_size}, or prepare the data with the model's vocabulary"
        )


def _vocabulary(model: ModelConfig, data_vocab_size: int | None, published: int) -> int:
    size = model.vocab_size or data_vocab_size or published
    check_vocabulary(size, data_vocab_size)
    return size


def _check_heads(model: ModelConfig) -> None:
    if model.hidden_size % model.num_heads:
        raise ModelError(
            f"hidden_size {model.hidden_size} is not a multiple of num_heads {model.num_heads}; change one of them"
        )
    if model.num_kv_heads is not None and model.num_heads % model.num_kv_heads:
        raise ModelError(
            f"num_heads {model.num_heads} is not a multiple of num_kv_heads {model.num_kv_heads}; change one of them"
        )
