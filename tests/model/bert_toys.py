"""A narrow BERT, transformers' own of the same weights, and a batch for both."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForPreTraining

from vpipe.model.chain import Chain, call_block
from vpipe.model.families.bert import build_bert_chain
from vpipe.model.families.bert_config import build_bert_config

VOCAB = 97


def toy_config(num_layers: int = 2, dropout: float = 0.0, tie_weights: bool = False) -> BertConfig:
    config = build_bert_config(
        hidden_size=32,
        num_layers=num_layers,
        num_heads=4,
        intermediate_size=48,
        vocab_size=VOCAB,
        max_position_embeddings=20,
        dropout=dropout,
        attention_dropout=dropout,
    )
    config.tie_word_embeddings = tie_weights
    return config


def theirs(tie_weights: bool, seed: int = 0, **options: object) -> BertForPreTraining:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForPreTraining(toy_config(tie_weights=tie_weights, **options))
        # As after some training: biases are not zero, layer norms not one.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model


def toy_chain(tie_weights: bool = False, **options: object) -> Chain:
    return build_bert_chain(toy_config(**options), tie_weights=tie_weights)


def batch(num_samples: int = 4, num_tokens: int = 12, targets: float = 0.2, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_samples)
    shape = (num_samples, num_tokens)
    ids = torch.randint(1, VOCAB, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.int64)
    if padded:
        mask[1, -3:] = mask[-1, -5:] = 0
    chosen = torch.rand(shape, generator=generator) < targets
    return {
        "input_ids": ids,
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
        "attention_mask": mask,
        "labels": torch.where(chosen, ids, -100),
        "next_sentence_label": torch.randint(0, 2, (num_samples,), generator=generator),
    }


def build(chain: Chain, seed: int = 0) -> list[nn.Module]:
    return [chain.materialise(index, seed) for index in range(len(chain))]


def run(chain: Chain, modules: list[nn.Module], fields: dict[str, Tensor]) -> dict[str, Tensor]:
    values = dict(fields)
    for block, module in zip(chain.blocks, modules, strict=True):
        values |= call_block(block, module, values)
    return values


def model_state(chain: Chain, modules: list[nn.Module]) -> dict[str, Tensor]:
    return {
        block.global_name(local): tensor
        for block, module in zip(chain.blocks, modules, strict=True)
        for local, tensor in module.state_dict().items()
    }
