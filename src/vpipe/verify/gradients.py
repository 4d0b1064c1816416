"""What one process does to gradients before an update, as docs/contract.md has it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["norm_of", "sum_gradients"]

_PIECE = 1 << 15
_MOST_PIECES = 256


def sum_gradients(copies: Sequence[nn.Parameter]) -> None:
    """Give all copies of one weight the sum of their gradients, in block order; none if none was used."""
    if all(copy.grad is None for copy in copies):
        return
    parts = [torch.zeros_like(copy) if copy.grad is None else copy.grad for copy in copies]
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    for copy in copies:
        copy.grad = total.clone()


def norm_of(gradient: Tensor) -> float:
    """Return the norm in float64: of a large gradient that of its pieces' norms."""
    gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
    gradient = torch.view_as_real(gradient) if gradient.is_complex() else gradient
    if gradient.numel() <= _PIECE:
        return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
    num_pieces = min(_MOST_PIECES, 1 + gradient.numel() // _PIECE)
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in gradient.flatten().chunk(num_pieces)]
    return float(torch.linalg.vector_norm(torch.stack(norms)))
