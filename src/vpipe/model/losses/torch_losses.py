"""What torch's own losses average over, read off the function or module that was given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from vpipe.errors import ModelError

__all__ = ["TorchLoss"]

_BY_TARGETS = (functional.cross_entropy, functional.nll_loss)
_FUNCTIONS = frozenset({
    *_BY_TARGETS,
    functional.binary_cross_entropy, functional.binary_cross_entropy_with_logits, functional.hinge_embedding_loss,
    functional.huber_loss, functional.kl_div, functional.l1_loss, functional.mse_loss, functional.multi_margin_loss,
    functional.multilabel_margin_loss, functional.multilabel_soft_margin_loss, functional.poisson_nll_loss,
    functional.smooth_l1_loss, functional.soft_margin_loss,
})  # fmt: skip
_MODULES = (
    nn.CrossEntropyLoss, nn.NLLLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.HingeEmbeddingLoss, nn.HuberLoss,
    nn.KLDivLoss, nn.L1Loss, nn.MSELoss, nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss,
    nn.PoissonNLLLoss, nn.SmoothL1Loss, nn.SoftMarginLoss,
)  # fmt: skip
_WEIGHED = ("binary_cross_entropy", "binary_cross_entropy_with_logits", "huber_loss", "l1_loss", "mse_loss",
            "BCELoss", "BCEWithLogitsLoss")  # fmt: skip
"""Those whose `weight` may have a row for each sample."""
_ELEMENTWISE = ("huber_loss", "l1_loss", "mse_loss", "smooth_l1_loss", "HuberLoss", "L1Loss", "MSELoss", "SmoothL1Loss")
"""Those that broadcast."""
_REDUCTIONS = {"mean": "mean", "batchmean": "mean", "sum": "sum"}


@dataclass(frozen=True)
class TorchLoss:
    """How one of torch's losses, with the arguments it was given, reduces what it computes for each target."""

    reduction: str
    """`mean` or `sum`."""
    by_targets: bool
    """Whether the mean is over targets that are not ignored, by the weights of their classes, and not over samples."""
    summed: Callable[..., Tensor]
    """The same loss, added up instead of averaged."""
    ignore_index: int = -100
    weight: Tensor | None = None
    """Of each class, where the mean is over targets."""
    is_smoothed: bool = False
    is_elementwise: bool = False
    """Whether output and target are compared number by number, after they were broadcast to one shape."""
    sample_weight: Tensor | None = None
    """What each number of a sample is multiplied by, or each of a batch."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> TorchLoss | None:
        """Read `function`, which may be a `functools.partial` with keywords; None: it is not one of torch's.

        Raises:
            ModelError: it does not reduce to one number.
        """
        if isinstance(function, nn.Module):
            # A subclass with a forward of its own may compute anything.
            kind = next((kind for kind in _MODULES if type(function).forward is kind.forward), None)
            if kind is None:
                return None
            summed = copy.copy(function)
            summed.reduction = "sum"  # type: ignore[assignment]
            by_targets = kind in (nn.CrossEntropyLoss, nn.NLLLoss)
            return cls._made(kind.__name__, by_targets, vars(function) | function._buffers, summed)
        plain, given = (function.func, function.keywords) if isinstance(function, partial) else (function, {})
        try:
            is_known = plain in _FUNCTIONS
        except TypeError:  # it has no hash
            return None
        if not is_known or (isinstance(function, partial) and function.args) or {"size_average", "reduce"} & set(given):
            return None
        arguments = {name: item.default for name, item in signature(plain).parameters.items()} | given
        return cls._made(plain.__name__, plain in _BY_TARGETS, arguments, partial(function, reduction="sum"))

    @classmethod
    def _made(cls, name: str, by_targets: bool, arguments: dict[str, Any], summed: Callable[..., Tensor]) -> TorchLoss:
        reduction = arguments["reduction"]
        if reduction not in _REDUCTIONS:
            raise ModelError(
                f"the loss {name} has reduction={reduction!r}, which gives a number for each sample; what is trained "
                "is one number: give it reduction='mean' or 'sum'"
            )
        weight = arguments.get("weight")
        if not by_targets:
            weight = weight if name in _WEIGHED else None
            return cls(_REDUCTIONS[reduction], False, summed, is_elementwise=name in _ELEMENTWISE, sample_weight=weight)
        is_smoothed = arguments.get("label_smoothing", 0.0) > 0
        return cls(_REDUCTIONS[reduction], True, summed, arguments["ignore_index"], weight, is_smoothed)

    @property
    def is_one_quotient(self) -> bool:
        """Tell whether the mean is exactly the sum by the number of targets, to the last bit."""
        return self.weight is None and not self.is_smoothed

    def count(self, target: Tensor) -> float:
        """Return by how much the mean over `target` divides: targets that are not ignored, each by its class's weight.

        Targets that are probabilities of classes, in their dimension 1, count as one for each distribution.
        """
        if target.is_floating_point():
            return float(target.numel() // (target.shape[1] if target.dim() > 1 else target.numel()))
        counted = target.ne(self.ignore_index)
        if self.weight is None:
            return float(counted.sum())
        # What is no class is told by the loss itself.
        counted &= target.ge(0) & target.lt(len(self.weight))
        return float(self.weight.to(target.device).index_select(0, target[counted]).sum())
