"""Where the backward of a stage begins: at the ends of the graph that its forward has made."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import GradientEdge

__all__ = ["edge_of", "one_or_nan"]


def one_or_nan(total: Tensor) -> Tensor:
    """Return one, or NaN where `total` is not finite, without waiting for the device."""
    return torch.sub(_one(total.dtype, total.device), total.detach(), alpha=0)


@cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones((), dtype=dtype, device=device)


def edge_of(value: Tensor) -> GradientEdge:
    """Return the edge of the graph at which the gradient of `value` enters it."""
    # What `get_gradient_edge` does takes several times as long.
    node = value.grad_fn
    if node is not None and not isinstance(node, FunctionCtx):
        return GradientEdge(node, value.output_nr)
    # A leaf has no node, and one that is written in Python does not keep its graph alive; that of a view does.
    node = value.view_as(value).grad_fn
    assert node is not None
    return GradientEdge(node, 0)
