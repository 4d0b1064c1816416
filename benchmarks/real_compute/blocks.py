"""The model of this benchmark: eight transformer blocks, the same weights and batch for every contestant."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

NUM_BLOCKS = 8
HIDDEN_SIZE = 512
NUM_TOKENS = 128
BATCH_SIZE = 16
LEARNING_RATE = 1e-3


def build_blocks() -> list[nn.Module]:
    """Build the eight blocks, from one seed."""
    torch.manual_seed(0)
    return [
        nn.TransformerEncoderLayer(HIDDEN_SIZE, nhead=8, dim_feedforward=4 * HIDDEN_SIZE, dropout=0.0, batch_first=True)
        for _ in range(NUM_BLOCKS)
    ]


def build_batch() -> tuple[Tensor, Tensor]:
    """Return inputs and targets, each (16, 128, 512)."""
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH_SIZE, NUM_TOKENS, HIDDEN_SIZE)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def build_parser(description: str) -> argparse.ArgumentParser:
    """Return the command line that all contestants of this benchmark share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--num-microbatches", type=int, default=8)
    parser.add_argument("--num-batches", type=int, default=6, help="measured batches")
    parser.add_argument("--num-warmup-batches", type=int, default=2)
    return parser
