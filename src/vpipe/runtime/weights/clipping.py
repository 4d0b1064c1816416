"""Gradient clipping by a norm that does not depend on how the model is cut.

Each parameter's squared norm is one entry, in float64, of a vector in model order. A rank fills in the entries of its
own parameters; the all-reduce adds zeros to them, which is exact; and the entries are summed without rounding error
before the final rounding (`math.fsum`). So every rank, on any partition, and one process alone get the same bits.

Asynchronous runs have no moment at which all gradients of an update exist: there each stage clips by its own norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "are_finite",
    "clip_coefficient",
    "device_of",
    "global_norm",
    "local_norm",
    "numbers_of",
    "scale_gradients",
    "squared_norms",
]

_EPSILON = 1e-6
_PIECE = 1 << 15
_MOST_PIECES = 256
"""A device needs a while for each."""


def numbers_of(gradient: Tensor) -> Tensor:
    """Return what a gradient is made of, as real numbers in a dense tensor: of a sparse one the values."""
    numbers = gradient.coalesce().values() if gradient.layout is torch.sparse_coo else gradient
    return torch.view_as_real(numbers) if numbers.is_complex() else numbers


def are_finite(gradients: Sequence[Tensor]) -> bool:
    """Tell whether all numbers of `gradients` are finite."""
    numbers = [numbers_of(gradient) for gradient in gradients]
    if not numbers:
        return True
    # What torch.amp's scaler does: one look at each number. Multiplying by 1 leaves them as they are.
    found, scale = torch.zeros(2, device=numbers[0].device).unbind()
    torch._amp_foreach_non_finite_check_and_unscale_(numbers, found, scale.fill_(1.0))
    return not found.item()


def squared_norms(gradients: Sequence[Tensor]) -> Tensor:
    """Return each gradient's squared norm, in float64 and on the gradients' device."""
    if not gradients:
        return torch.zeros(0, dtype=torch.float64)
    return torch.stack([_norm(numbers_of(item)) for item in gradients]).square()


def _norm(gradient: Tensor) -> Tensor:
    """Return the norm in float64, piece by piece: torch copies what it converts, which is twice an embedding."""
    if gradient.numel() <= _PIECE:
        norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    else:
        pieces = gradient.reshape(-1).chunk(min(_MOST_PIECES, 1 + gradient.numel() // _PIECE))
        norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces]
        norm = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def local_norm(gradients: Sequence[Tensor]) -> float:
    """Return the norm of `gradients` taken together: of one stage, in an asynchronous run."""
    return math.sqrt(math.fsum(squared_norms(gradients).tolist()))


def global_norm(
    placed: Sequence[tuple[int, Tensor]], num_parameters: int, group: dist.ProcessGroup | None = None
) -> float:
    """Return the norm of all ranks' gradients; collective over `group`, or of this process alone where that is None.

    `placed` holds this rank's gradients, each with its place among the model's `num_parameters`. No place may appear
    twice on all ranks together, so of a tied weight's copies, whose gradients are the same sum, only one is listed.
    """
    vector = torch.zeros(num_parameters, dtype=torch.float64, device=device_of(group))
    if placed:
        places = torch.tensor([place for place, _ in placed], device=vector.device)
        vector[places] = squared_norms([gradient for _, gradient in placed]).to(vector.device)
    if group is not None:
        dist.all_reduce(vector, group=group)
    return math.sqrt(math.fsum(vector.tolist()))


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Return the factor that brings gradients of this norm down to `max_norm`: ``min(1, max_norm / (norm + 1e-6))``."""
    return min(1.0, max_norm / (norm + _EPSILON))


def scale_gradients(gradients: Sequence[Tensor], coefficient: float) -> None:
    """Multiply `gradients` by `coefficient` in place; a factor of 1 costs nothing."""
    if coefficient == 1.0:
        return
    dense = [gradient for gradient in gradients if gradient.layout is torch.strided]
    if dense:
        torch._foreach_mul_(dense, coefficient)
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            gradient.mul_(coefficient)


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """Return the device of the tensors that `group` exchanges."""
    uses_gpu = group is not None and dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if uses_gpu else torch.device("cpu")
