"""Narrow decoders, transformers' own of the same weights, and a batch for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from vpipe.model.chain import Chain
from vpipe.model.families.gpt import build_gpt_chain
from vpipe.model.families.llama import build_llama_chain

VOCAB = 97


def _gpt_config(num_layers: int, dropout: float) -> GPT2Config:
    return GPT2Config(
        n_embd=32, n_layer=num_layers, n_head=4, n_inner=48, vocab_size=VOCAB, n_positions=20,
        embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout, use_cache=False,
    )  # fmt: skip


def _llama_config(num_layers: int, dropout: float) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32, num_hidden_layers=num_layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=VOCAB, max_position_embeddings=20, attention_dropout=dropout, use_cache=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How to make a narrow model of one kind, theirs and ours."""

    make_config: Callable[[int, float], Any]
    reference: type[nn.Module]
    build: Callable[..., Chain]
    words: str

    def config(self, num_layers: int = 2, dropout: float = 0.0) -> Any:
        return self.make_config(num_layers, dropout)

    def theirs(self, tie_weights: bool, seed: int = 0) -> nn.Module:
        config = self.config()
        config.tie_word_embeddings = tie_weights
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.reference(config)
            # As after some training: biases are not zero, layer norms not one.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
            return model

    def chain(self, tie_weights: bool = False, **options: Any) -> Chain:
        return self.build(self.config(**options), tie_weights=tie_weights)


FAMILIES = {
    "gpt": Family(_gpt_config, GPT2LMHeadModel, build_gpt_chain, "transformer.wte.weight"),
    "llama": Family(_llama_config, LlamaForCausalLM, build_llama_chain, "model.embed_tokens.weight"),
}


def batch(num_samples: int = 4, num_tokens: int = 12) -> dict[str, Tensor]:
    """Return samples of which two end early: what comes after is no target."""
    generator = torch.Generator().manual_seed(num_samples)
    ids = torch.randint(1, VOCAB, (num_samples, num_tokens), generator=generator)
    labels = ids.clone()
    labels[1, -3:] = labels[-1, -5:] = -100
    return {"input_ids": ids, "labels": labels}
