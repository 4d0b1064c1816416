"""Backward in two halves: gradients for inputs now, gradients for weights later.

While a forward runs, calls of `torch.nn.functional.linear` whose weight is a parameter, and of `torch.addmm` with
parameters as bias and weight (the `Conv1D` of transformers' GPT-2), are replaced by a function with the same result,
whose backward computes the input's gradient only and notes what the weight's gradient needs: the layer's input, and the
gradient of its output. Everything else is freed with the graph, as always. `run_deferred` computes the noted gradients.
Nothing is computed twice, and the bits are those of an ordinary backward.

A module has to satisfy nothing for that. Parameters that are used otherwise (normalisation, embeddings, convolutions,
and what `torch.nn.MultiheadAttention` does inside one function of torch), or more than once, get their gradients in
the first half. So a module is worth splitting as far as its weight gradients are those of linear layers, as in
transformers.

Source of the idea: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["DeferWeightGradients", "Deferred", "held_tensors", "run_deferred", "tell_split"]

logger = logging.getLogger(__name__)

Deferred = list[Callable[[], None]]
"""Weight gradients that are still to be computed, in the order of the backward."""


_WORTH_TELLING = 0.1


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, deferred: Deferred, uses: Counter[int]
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        # Saved tensors may come back as copies (recomputation); gradients belong to the parameters themselves.
        ctx.parameters = weight, bias
        ctx.deferred, ctx.uses = deferred, uses
        return nn.functional.linear(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight = ctx.saved_tensors
        rows = gradients[0].reshape(-1, gradients[0].shape[-1])
        rest = _WeightGradient(rows, hidden.reshape(-1, hidden.shape[-1]), *ctx.parameters)
        to_hidden = rows.mm(weight).view(hidden.shape) if ctx.needs_input_grad[0] else None
        return to_hidden, *_defer(ctx, rest), None, None


class _Product(torch.autograd.Function):
    """`torch.addmm`: a linear layer whose weight is the other way round, for rows alone."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, deferred: Deferred, uses: Counter[int]
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.parameters = weight, bias
        ctx.deferred, ctx.uses = deferred, uses
        return torch.addmm(bias, hidden, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight = ctx.saved_tensors
        (rows,) = gradients
        to_hidden = None
        if ctx.needs_input_grad[0]:
            # The gradient is laid out as what it is of, as autograd does.
            by_columns = hidden.stride() == (1, hidden.shape[0])
            to_hidden = weight.mm(rows.t()).t() if by_columns else rows.mm(weight.t())
        return to_hidden, *_defer(ctx, _ProductGradient(rows, hidden, *ctx.parameters)), None, None


def _defer(ctx: Any, rest: _WeightGradient) -> tuple[Tensor | None, Tensor | None]:
    """Note the rest of a backward; return the gradients that cannot wait."""
    if any(ctx.uses[id(parameter)] > 1 for parameter in ctx.parameters if parameter is not None):
        # Autograd adds the gradients of all uses to each other before it adds them to those of other microbatches.
        return rest.of_weight(), rest.of_bias()
    ctx.deferred.append(rest)
    return None, None


class _WeightGradient:
    """What is left to do for one linear layer and one microbatch."""

    def __init__(self, rows: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        # Its history would keep the input of the stage, whose memory is wanted for the next message.
        self._rows, self._hidden, self._weight, self._bias = rows, hidden.detach(), weight, bias

    def of_weight(self) -> Tensor | None:
        return self._rows.t().mm(self._hidden) if self._weight.requires_grad else None

    def of_bias(self) -> Tensor | None:
        return self._rows.sum(0) if self._bias is not None and self._bias.requires_grad else None

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None]:
        return self._weight, self._bias

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Return what is held for it."""
        return self._rows, self._hidden

    def __call__(self) -> None:
        for parameter, gradient in ((self._weight, self.of_weight()), (self._bias, self.of_bias())):
            if parameter is not None and gradient is not None:
                _accumulate(parameter, gradient)


class _ProductGradient(_WeightGradient):
    def of_weight(self) -> Tensor | None:
        return self._hidden.t().mm(self._rows) if self._weight.requires_grad else None


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


class DeferWeightGradients(TorchFunctionMode):
    """Within this context, the weight gradients of linear layers are noted in `deferred` when the backward runs."""

    def __init__(self, deferred: Deferred) -> None:
        super().__init__()
        self._deferred = deferred
        self._uses: Counter[int] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, nn.Parameter):
                self._uses[id(argument)] += 1
        if func is nn.functional.linear and torch.is_grad_enabled():
            hidden, weight, bias = _arguments(*args, **kwargs)
            if _can_defer(weight) and (bias is None or _can_defer(bias)):
                return _Linear.apply(hidden, weight, bias, self._deferred, self._uses)  # type: ignore[no-untyped-call]
        if func is torch.addmm and not kwargs and len(args) == 3 and torch.is_grad_enabled() and _is_layer(*args):
            bias, hidden, weight = args
            return _Product.apply(hidden, weight, bias, self._deferred, self._uses)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _is_layer(bias: Tensor, hidden: Tensor, weight: Tensor) -> bool:
    """Tell whether a product and sum is that of a layer: both parameters, laid out in the usual way."""
    return _can_defer(weight) and _can_defer(bias) and weight.is_contiguous() and bias.shape == weight.shape[1:]


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _can_defer(parameter: Tensor) -> bool:
    # Autograd must see the gradient of a weight that was itself computed, has hooks, or came as a value of the chain.
    return (
        isinstance(parameter, nn.Parameter)
        and parameter.is_leaf
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
    )


def run_deferred(deferred: Deferred) -> None:
    """Compute the noted gradients, in the order of the backward, and forget what they needed."""
    with torch.no_grad():
        for index, compute in enumerate(deferred):
            compute()
            deferred[index] = _done
    deferred.clear()


def held_tensors(deferred: Iterable[Callable[[], None]]) -> Iterator[Tensor]:
    """Yield what the noted gradients still need."""
    for compute in deferred:
        if isinstance(compute, _WeightGradient):
            yield from compute.tensors()


def tell_split(stage: int, named: Sequence[tuple[str, Tensor]], deferred: Deferred) -> None:
    """Log how much of a stage's weights, given by name, the first half of a backward has left to the second."""
    noted = {id(item) for each in deferred if isinstance(each, _WeightGradient) for item in each.parameters}
    others = [(name, weight) for name, weight in named if id(weight) not in noted]
    if named and not deferred:
        logger.warning(
            "stage %d: none of its weights is that of a linear layer, so its backwards are not split: the first half "
            "does all of the work. A schedule with full backwards, such as 1f1b, does the same",
            stage,
        )
        return
    share = sum(weight.numel() for _, weight in others) / max(1, sum(weight.numel() for _, weight in named))
    if noted and share > _WORTH_TELLING:
        logger.info(
            "stage %d: the first half of a backward computes the gradients of %.0f %% of its weights, those that are "
            "not of linear layers, such as %s",
            stage,
            100 * share,
            max(others, key=lambda pair: pair[1].numel())[0],
        )


def _done() -> None:
    """Hold nothing."""
