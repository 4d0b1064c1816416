"""Real transformer blocks to measure on."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

__all__ = ["bert_blocks", "torch_block"]


def bert_blocks(num_blocks: int, hidden_size: int) -> list[nn.Module]:
    """Return BERT's transformer blocks, as transformers has them, dropout on: all their matrices are linear layers."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=hidden_size, num_attention_heads=hidden_size // 64, intermediate_size=4 * hidden_size
    )
    config._attn_implementation = "sdpa"
    return [BertLayer(config) for _ in range(num_blocks)]


def torch_block(hidden_size: int) -> nn.Module:
    """Return torch's own transformer block, whose attention is one function with four matrices."""
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(hidden_size, hidden_size // 64, 4 * hidden_size, batch_first=True)
