"""Whether a loss is the mean over the samples it is given, found out by giving it some of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vpipe.errors import ModelError
from vpipe.model.rng import noticing_draws

__all__ = ["LossProbe"]

_TOLERANCE = 1e-4

_WAYS = (
    "Say how it is to be put together:\n"
    "  vpipe.CallableLoss(loss, reduction='sum')  where it adds over samples;\n"
    "  vpipe.CallableLoss(loss, num_targets=lambda target: (target != -1).sum())  where it is a mean over fewer "
    "targets, with the function that counts them;\n"
    "  vpipe.CallableLoss(loss, reduction='mean')  where the mean of the microbatches' losses is what you want, as for "
    "one that compares the samples it is given with each other;\n"
    "or give an object with the methods of vpipe.Loss"
)


class LossProbe:
    """Looks once, at the first samples of the first batch that is cut into several microbatches."""

    def __init__(self) -> None:
        self._is_done = False
        self._first: tuple[tuple[Tensor, ...], int] | None = None

    def look(self, function: Callable[..., Any], tensors: Sequence[Tensor], num_samples: int) -> None:
        """Compare the loss of some samples with the mean of its halves; what cannot be compared is believed.

        Raises:
            ModelError: it is no mean over samples.
        """
        if self._is_done:
            return
        given = tuple(tensor.detach() for tensor in tensors)
        if num_samples == 1 and self._first is None:
            self._first = given, num_samples
            return
        if self._first is not None:
            halves = [self._first, (given, num_samples)]
            self._first = None
        else:
            halves = _halved(given, num_samples)
        self._is_done = True
        if halves:
            _compare(function, halves)


def _halved(tensors: Sequence[Tensor], num_samples: int) -> list[tuple[tuple[Tensor, ...], int]]:
    """Return the rows of the first half of the samples, and those of the others; nothing where rows are no samples."""
    if any(not tensor.dim() or tensor.shape[0] % num_samples for tensor in tensors):
        return []
    half = num_samples // 2
    cuts = [tensor.shape[0] // num_samples * half for tensor in tensors]
    return [
        (tuple(tensor[:cut] for tensor, cut in zip(tensors, cuts, strict=True)), half),
        (tuple(tensor[cut:] for tensor, cut in zip(tensors, cuts, strict=True)), num_samples - half),
    ]


def _compare(function: Callable[..., Any], halves: Sequence[tuple[tuple[Tensor, ...], int]]) -> None:
    try:
        # Copied, because what it keeps between calls must be as if nobody had looked.
        call = _copy(function)
        with torch.no_grad(), noticing_draws() as has_drawn:
            parts = [float(call(*tensors)) for tensors, _ in halves]
            joined = [torch.cat(pair) for pair in zip(*(tensors for tensors, _ in halves), strict=True)]
            whole = float(call(*joined))
            if has_drawn() or float(call(*halves[0][0])) != parts[0]:
                return  # it is another one each time
    except Exception:  # it was never promised that the loss takes other numbers of samples
        return
    numbers = [number for _, number in halves]
    mean = sum(part * number for part, number in zip(parts, numbers, strict=True)) / sum(numbers)
    # Sums of half precision are as far off as their own last digit.
    precision = max([torch.finfo(item.dtype).eps for item in halves[0][0] if item.is_floating_point()], default=0.0)
    allowed = max(_TOLERANCE, 32 * precision) * max(abs(whole), *map(abs, parts)) + 1e-6
    if not math.isfinite(whole) or abs(whole - mean) <= allowed:
        return
    is_sum = abs(whole - sum(parts)) <= allowed
    shown = " and ".join(f"{part:.6g} of {number}" for part, number in zip(parts, numbers, strict=True))
    raise ModelError(
        f"the loss is no mean over samples: of {sum(numbers)} samples it is {whole:.6g}, but {shown}, whose mean is "
        f"{mean:.6g}{' (their sum is right)' if is_sum else ''}. A batch is cut into microbatches, whose losses "
        f"are averaged, so it would be another loss than that of the whole batch. {_WAYS}"
    )


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    weights = list(function.parameters()) if isinstance(function, nn.Module) else []
    copied: Callable[..., Any] = copy.deepcopy(function, {id(item): item for item in weights})
    return copied
