"""What chains of decoders have in common: their fields, and blocks made of transformers' modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vpipe.errors import ModelError
from vpipe.model.block import Block

__all__ = ["DECODER_FIELDS", "check_num_tokens", "decoder_block"]

DECODER_FIELDS = ("input_ids", "labels")

Initialise = Callable[[nn.Module], None]


def decoder_block(
    name: str,
    make: Callable[[], nn.Module],
    initialise: Initialise,
    keys: tuple[tuple[str, str], ...],
    inputs: tuple[str, ...] = ("hidden",),
    outputs: tuple[str, ...] = ("hidden",),
) -> Block:
    """Return a block that is made without memory and then initialised: layers' own initialisation costs nothing.

    `initialise` fills all parameters and buffers of the module that `make` returns. Of `keys` see `Block`.
    """
    return Block(name, partial(_build, make, initialise), inputs, outputs, keys)


def check_num_tokens(input_ids: Tensor, max_tokens: int) -> int:
    """Return the tokens per sample.

    Raises:
        ModelError: there are more than the model has positions for.
    """
    num_tokens = input_ids.shape[1]
    if num_tokens > max_tokens:
        raise ModelError(
            f"samples of {num_tokens} tokens do not fit a model with max_position_embeddings {max_tokens}; "
            "raise it, or prepare shorter samples"
        )
    return num_tokens


def _build(make: Callable[[], nn.Module], initialise: Initialise) -> nn.Module:
    device: Any = torch.get_default_device()
    with torch.device("meta"):
        module = make()
    if device.type != "meta":
        with torch.no_grad():
            initialise(module.to_empty(device=device))
    return module
