"""GPT-2 (and models of its kind, GPT-3 among them) as a chain of 2 * num_layers + 2 blocks.

An embedding, then attention and feed-forward by layer, then the head with the last layer norm. Outputs, loss and
`state_dict` names are those of transformers' `GPT2LMHeadModel`, whose parts the blocks are made of.
"""

from __future__ import annotations

import copy
import math
from functools import partial

import torch
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.pytorch_utils import Conv1D

from vpipe.errors import ModelError
from vpipe.model.chain import Chain, ParameterRef
from vpipe.model.families.causal_loss import CausalLoss
from vpipe.model.families.decoder import DECODER_FIELDS, check_num_tokens, decoder_block

__all__ = ["build_gpt_chain"]


def build_gpt_chain(config: GPT2Config, *, tie_weights: bool) -> Chain:
    """Return GPT-2 with the loss of its next token, of any size, over the batch fields `DECODER_FIELDS`.

    `input_ids` and `labels` (-100 where there is no target) have the shape (samples, tokens). With `tie_weights` the
    output matrix is the token embedding; the config's own `tie_word_embeddings` is not looked at.

    Raises:
        ModelError: the config is that of a model with cross attention.
    """
    if config.add_cross_attention:
        raise ModelError("the config has cross attention, whose other input a chain does not have; set it to False")
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    fill = partial(_initialise, std=config.initializer_range, num_layers=config.num_hidden_layers)
    body = (("", "transformer."),)
    blocks = [decoder_block("embedding", partial(_Embedding, config), fill, body, ("input_ids",))]
    for layer in range(config.num_hidden_layers):
        keys = (("", f"transformer.h.{layer}."),)
        blocks += [
            decoder_block(f"layer.{layer}.attention", partial(_Attention, config, layer), fill, keys),
            decoder_block(f"layer.{layer}.feed_forward", partial(_FeedForward, config), fill, keys),
        ]
    head_keys = (("lm_head.", "lm_head."), ("", "transformer."))
    blocks.append(decoder_block("head", partial(_Head, config), fill, head_keys, outputs=("logits",)))
    words = ParameterRef(0, "wte.weight")
    output = ParameterRef(len(blocks) - 1, "lm_head.weight")
    return Chain(tuple(blocks), DECODER_FIELDS, CausalLoss(), ((words, output),) if tie_weights else ())


def _initialise(module: nn.Module, *, std: float, num_layers: int) -> None:
    """Draw initial weights from the distributions of transformers' `GPT2PreTrainedModel`."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding | Conv1D):
            part.weight.normal_(0.0, std)
        if isinstance(part, nn.LayerNorm):
            part.weight.fill_(1.0)
        bias = getattr(part, "bias", None)
        if isinstance(bias, Tensor):
            bias.zero_()
    # What is added to the residual stream is smaller, the more layers there are.
    for name, parameter in module.named_parameters():
        if name.endswith("c_proj.weight"):
            parameter.normal_(0.0, std / math.sqrt(2 * num_layers))


class _Embedding(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.drop = nn.Dropout(config.embd_pdrop)

    def forward(self, input_ids: Tensor) -> Tensor:
        num_tokens = check_num_tokens(input_ids, self.wpe.num_embeddings)
        positions = torch.arange(num_tokens, device=input_ids.device).unsqueeze(0)
        hidden: Tensor = self.drop(self.wte(input_ids.long()) + self.wpe(positions))
        return hidden


class _Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        # The layer's number scales the attention in few models; in the others it would only make equal blocks differ.
        self.attn = gpt2.GPT2Attention(config, layer_idx=layer if config.scale_attn_by_inverse_layer_idx else 0)

    def forward(self, hidden: Tensor) -> Tensor:
        attended: Tensor = self.attn(self.ln_1(hidden))[0]
        return attended + hidden


class _FeedForward(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = gpt2.GPT2MLP(config.n_inner or 4 * config.hidden_size, config)

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = hidden + self.mlp(self.ln_2(hidden))
        return result


class _Head(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.ln_f(hidden))
        return logits
