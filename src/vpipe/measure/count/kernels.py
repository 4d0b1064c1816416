"""Let operations that run in other ways on a GPU run in those, though there is none: dropout and attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Attention", "DeviceKernels"]

Attention = Literal["flash", "plain"]
"""`flash`: one kernel that holds no scores (Dao 2023); `plain`: scores, softmax and dropout are held."""


class DeviceKernels(TorchFunctionMode):
    """Within this context, dropout keeps a mask of one byte per element, and attention is of the given kind."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is nn.functional.dropout:
            return _dropout(*args, **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            return (_flash if self._attention == "flash" else _plain)(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p else input


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is None:
        result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
        return result
    # Flash attention has no masks; the kernel that has them wants one entry per score, which may be a repeated one.
    bias = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    masked: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]
    return masked


def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (item.repeat_interleave(query.shape[1] // item.shape[1], dim=1) for item in (key, value))
    scores = torch.matmul(query, key.transpose(-1, -2))
    # Scale and mask are applied by the kernel of the softmax, as in Megatron-LM.
    return torch.matmul(_dropout(torch.softmax(scores, dim=-1), dropout_p), value)
