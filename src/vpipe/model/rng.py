"""Random numbers as a function of where they are used, so that they do not depend on the partition."""

from __future__ import annotations

import hashlib
import struct

import torch

__all__ = ["derive_seed", "seed_everything"]


def derive_seed(*parts: int | str) -> int:
    """Mix `parts` into a 63-bit seed: equal parts give equal seeds on every machine and in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int(struct.unpack("<Q", digest)[0] >> 1)


def seed_everything(seed: int) -> None:
    """Set the default generators of CPU and, where it is in use, of CUDA."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
