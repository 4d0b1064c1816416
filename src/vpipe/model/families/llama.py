"""Llama as a chain of 2 * num_layers + 2 blocks: embedding, then attention and feed-forward by layer, then the head.

Outputs, loss and `state_dict` names are those of transformers' `LlamaForCausalLM`, whose parts the blocks are made of.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as llama

from vpipe.model.chain import Chain, ParameterRef
from vpipe.model.families.causal_loss import CausalLoss
from vpipe.model.families.decoder import DECODER_FIELDS, check_num_tokens, decoder_block

__all__ = ["build_llama_chain"]


def build_llama_chain(config: LlamaConfig, *, tie_weights: bool) -> Chain:
    """Return Llama with the loss of its next token, of any size, over the batch fields `DECODER_FIELDS`.

    `input_ids` and `labels` (-100 where there is no target) have the shape (samples, tokens). With `tie_weights` the
    output matrix is the token embedding; the config's own `tie_word_embeddings` is not looked at.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    fill = partial(_initialise, config=config)
    blocks = [decoder_block("embedding", partial(_Embedding, config), fill, (("", "model."),), ("input_ids",))]
    for layer in range(config.num_hidden_layers):
        keys = (("", f"model.layers.{layer}."),)
        blocks += [
            decoder_block(f"layer.{layer}.attention", partial(_Attention, config), fill, keys),
            decoder_block(f"layer.{layer}.feed_forward", partial(_FeedForward, config), fill, keys),
        ]
    head_keys = (("lm_head.", "lm_head."), ("", "model."))
    blocks.append(decoder_block("head", partial(_Head, config), fill, head_keys, outputs=("logits",)))
    words = ParameterRef(0, "embed_tokens.weight")
    output = ParameterRef(len(blocks) - 1, "lm_head.weight")
    return Chain(tuple(blocks), DECODER_FIELDS, CausalLoss(), ((words, output),) if tie_weights else ())


def _initialise(module: nn.Module, config: LlamaConfig) -> None:
    """Draw initial weights from the distributions of transformers' `LlamaPreTrainedModel`."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.weight.normal_(0.0, config.initializer_range)
            if isinstance(part, nn.Linear) and part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, llama.LlamaRMSNorm):
            part.weight.fill_(1.0)
        elif isinstance(part, llama.LlamaRotaryEmbedding):
            for name, buffer in llama.LlamaRotaryEmbedding(config).named_buffers():
                part.get_buffer(name).copy_(buffer)


class _Embedding(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.max_tokens: int = config.max_position_embeddings

    def forward(self, input_ids: Tensor) -> Tensor:
        check_num_tokens(input_ids, self.max_tokens)
        hidden: Tensor = self.embed_tokens(input_ids.long())
        return hidden


class _Attention(nn.Module):
    """The angles of the positions are computed here again in every layer, so that they do not cross cuts."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = llama.LlamaAttention(config, layer_idx=0)
        self.rotary = llama.LlamaRotaryEmbedding(config)

    def forward(self, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        normed = self.input_layernorm(hidden)
        angles = self.rotary(normed, positions)
        attended: Tensor = self.self_attn(normed, position_embeddings=angles)[0]
        return hidden + attended


class _FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.post_attention_layernorm = llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = llama.LlamaMLP(config)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return result


class _Head(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.norm = llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits
