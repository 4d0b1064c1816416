"""Backward in two halves: gradients for inputs now, gradients for weights later.

While a forward runs, calls of `torch.nn.functional.linear` whose weight is a parameter, and of `torch.addmm` with
parameters as bias and weight (the `Conv1D` of transformers' GPT-2), are replaced by a function with the same result,
whose backward computes the input's gradient only and notes what the weight's gradient needs: the layer's input, and the
gradient of its output. Everything else is freed with the graph, as always. `run_deferred` computes the noted gradients.
Nothing is computed twice, and the bits are those of an ordinary backward.

A module has to satisfy nothing for that. Only what is known to give these bits is replaced: real numbers of one type,
laid out in the usual way, outside of autocast, of function transforms, of forward derivatives, and of what keeps saved
tensors in its own way, such as a checkpoint of the user's. All else is the plain operation, and has its gradients in
the first half, as have parameters that are used otherwise (normalisation, embeddings, convolutions, and what
`torch.nn.MultiheadAttention` does inside one function of torch), or more than once. Gradients that a forward itself
asks for are no part of the stage's backward: they are computed at once. So a module is worth splitting as far as its
weight gradients are those of linear layers, as in transformers.

Source of the idea: Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from vpipe.runtime.stage.findings import Findings

__all__ = [
    "DeferWeightGradients",
    "Deferred",
    "blocks_with_unseen_uses",
    "held_tensors",
    "run_deferred",
    "tell_split",
]

logger = logging.getLogger(__name__)


class Deferred(list[Callable[[], None]]):
    """Weight gradients that are still to be computed, in the order of the backward that is `collecting` them.

    A forward that differentiates gradients makes a graph of the backward, too. To the bit this is what it is without
    splitting only where nothing is replaced, so such blocks are noted in `findings`, and left to autograd.
    """

    def __init__(self, findings: Findings | None = None) -> None:
        super().__init__()
        self.findings = Findings() if findings is None else findings
        self.is_collecting = False

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Note what the backward in this context leaves for later; any other one computes all of it."""
        self.is_collecting = True
        try:
            yield
        finally:
            self.is_collecting = False


_WORTH_TELLING = 0.1


class _Layer(torch.autograd.Function):
    """An operation whose backward can leave the gradients of weight and bias for later."""

    @staticmethod
    def operation(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute what is replaced."""
        raise NotImplementedError

    @staticmethod
    def halve(ctx: Any, gradient: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, _WeightGradient]:
        """Return the gradient of `hidden`, if it needs one, and what is left to do."""
        raise NotImplementedError

    @classmethod
    def backward(cls, ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        is_usual = gradients[0].dim() < 4 or gradients[0].is_contiguous()
        if torch.is_grad_enabled():
            ctx.mode.be_whole()
        if not ctx.mode.is_collecting or torch.is_grad_enabled() or not is_usual:
            return *_differentiate(cls.operation, gradients[0], hidden, weight, ctx), None
        to_hidden, rest = cls.halve(ctx, gradients[0], hidden, weight)
        if any(ctx.mode.uses[id(parameter)] > 1 for parameter in ctx.parameters if parameter is not None):
            # Autograd adds the gradients of all uses to each other before it adds them to those of other microbatches.
            return to_hidden, rest.of_weight(), rest.of_bias(), None
        ctx.mode.deferred.append(rest)
        return to_hidden, None, None, None


def _keep(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, mode: DeferWeightGradients) -> None:
    ctx.save_for_backward(hidden, weight)
    # Saved tensors may come back as copies (recomputation); gradients belong to the parameters themselves.
    ctx.parameters, ctx.mode = (weight, bias), mode


def _differentiate(
    operation: Callable[..., Tensor], gradient: Tensor, hidden: Tensor, weight: Tensor, ctx: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return all gradients as autograd has them, which can be differentiated again where that is wanted.

    Such backwards are those of a forward's own, so the operation is repeated for them.
    """
    again = torch.is_grad_enabled()
    bias = ctx.parameters[1]
    given: tuple[Tensor, Tensor, Tensor | None] = hidden, weight, bias
    with torch.enable_grad():
        if not again:
            given = _as_leaf(hidden), _as_leaf(weight), None if bias is None else _as_leaf(bias)
        output = operation(*given)
        wanted = [each for each in given if each is not None and each.requires_grad]
        found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=again))
    to_hidden, to_weight, to_bias = (next(found) if each is not None and each.requires_grad else None for each in given)
    return to_hidden, to_weight, to_bias


def _as_leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


class _Linear(_Layer):
    """`torch.nn.functional.linear`."""

    @staticmethod
    def operation(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(hidden, weight, bias)

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, mode: DeferWeightGradients) -> Tensor:
        _keep(ctx, hidden, weight, bias, mode)
        made = nn.functional.linear(hidden, weight, bias)
        # Autograd lets nobody change in place what is a view already when a function returns it.
        return torch.ops.aten._unsafe_view(made, made.shape) if made._is_view() else made

    @staticmethod
    def halve(ctx: Any, gradient: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, _WeightGradient]:
        is_flat = hidden.dim() == 2
        rows = gradient if is_flat else gradient.reshape(-1, gradient.shape[-1])
        inputs = hidden if is_flat else hidden.reshape(-1, hidden.shape[-1])
        rest = _WeightGradient(rows, inputs, *ctx.parameters)
        if not ctx.needs_input_grad[0]:
            return None, rest
        to_inputs = _to_inputs(rows, inputs, weight.t())
        return to_inputs if is_flat else to_inputs.view(hidden.shape), rest


class _Product(_Layer):
    """`torch.addmm`: a linear layer whose weight is the other way round, for rows alone."""

    @staticmethod
    def operation(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert bias is not None
        return torch.addmm(bias, hidden, weight)

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, mode: DeferWeightGradients) -> Tensor:
        _keep(ctx, hidden, weight, bias, mode)
        return torch.addmm(bias, hidden, weight)

    @staticmethod
    def halve(ctx: Any, gradient: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, _WeightGradient]:
        to_hidden = _to_inputs(gradient, hidden, weight) if ctx.needs_input_grad[0] else None
        return to_hidden, _ProductGradient(gradient, hidden, *ctx.parameters)


def _to_inputs(rows: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of `inputs`, laid out as they are, as autograd does for ``inputs.mm(weight)``."""
    by_columns = inputs.stride() == (1, inputs.shape[0])
    return weight.mm(rows.t()).t() if by_columns else rows.mm(weight.t())


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
    """Within this context, weight gradients of linear layers are noted in `deferred` when it collects a backward."""

    def __init__(self, deferred: Deferred, block: int = 0) -> None:
        super().__init__()
        self.deferred = deferred
        self.block = block
        self.uses: Counter[int] = Counter()
        """How often each parameter was given to a function of torch, by its identity."""
        self._is_running = False

    def __enter__(self) -> DeferWeightGradients:
        # Who keeps saved tensors in his own way inside of here may run what he wraps once more, outside of here.
        self._hooks = _top_saved_tensors_default_hooks(False)
        self._is_running = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._is_running = False
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @property
    def is_collecting(self) -> bool:
        """Tell whether a backward that runs now is the stage's; one that the forward itself starts is not."""
        return self.deferred.is_collecting and not self._is_running

    def be_whole(self) -> None:
        """Leave the block to autograd from now on, and if that is possible begin it again."""
        findings = self.deferred.findings
        findings.add(findings.whole, self.block)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._count(args)
        self._count(kwargs.values())
        if torch.is_grad_enabled() and not types:
            if func is nn.functional.linear:
                hidden, weight, bias = _arguments(*args, **kwargs)
                if self._can_defer(hidden, weight, bias) and (bias is None or bias.shape == weight.shape[:1]):
                    return _Linear.apply(hidden, weight, bias, self)  # type: ignore[no-untyped-call]
            elif func is torch.addmm and not kwargs and len(args) == 3:
                bias, hidden, weight = args
                if self._can_defer(hidden, weight, bias) and hidden.dim() == 2 and bias.shape == weight.shape[1:]:
                    return _Product.apply(hidden, weight, bias, self)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)

    def _count(self, arguments: Iterable[Any]) -> None:
        for argument in arguments:
            if isinstance(argument, nn.Parameter):
                self.uses[id(argument)] += 1
            elif isinstance(argument, list | tuple):
                self._count(argument)

    def _can_defer(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Tell whether what autograd would do for this layer is known, to the bit."""
        return (
            _is_plain(weight)
            and weight.dim() == 2
            and (bias is None or (_is_plain(bias) and bias.dtype == weight.dtype))
            and hidden.dtype == weight.dtype
            and hidden.dtype.is_floating_point
            and hidden.layout is torch.strided
            and hidden.dim() > 1
            and (hidden.is_contiguous() or _is_transposed(hidden))
            and not torch.is_autocast_enabled(hidden.device.type)
            and peek_interpreter_stack() is None
            and forward_ad._current_level < 0
            and _top_saved_tensors_default_hooks(False) == self._hooks
        )


def _arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _is_plain(parameter: Tensor) -> bool:
    # Autograd must see the gradient of a weight that was itself computed, has hooks, or came as a value of the chain.
    return (
        type(parameter) is nn.Parameter
        and parameter.is_leaf
        and parameter.layout is torch.strided
        and parameter.is_contiguous()
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
    )


def _is_transposed(hidden: Tensor) -> bool:
    return hidden.dim() == 2 and hidden.t().is_contiguous()


def blocks_with_unseen_uses(values: Iterable[Tensor]) -> set[int]:
    """Return the blocks with a layer whose weights the graph of `values` uses more often than was seen.

    That is so in scripted modules and in function transforms. Takes a microsecond per node of the graph.
    """
    uses: Counter[int] = Counter()
    layers: dict[int, DeferWeightGradients] = {}
    nodes = [value.grad_fn for value in values if value.grad_fn is not None]
    known = set(nodes)
    while nodes:
        node = nodes.pop()
        mode = getattr(node, "mode", None)
        for following, _ in node.next_functions:
            if following is None:
                continue
            if (variable := getattr(following, "variable", None)) is not None:
                uses[id(variable)] += 1
                if isinstance(mode, DeferWeightGradients):
                    layers[id(variable)] = mode
            elif following not in known:
                known.add(following)
                nodes.append(following)
    return {mode.block for place, mode in layers.items() if uses[place] > mode.uses[place]}


def run_deferred(deferred: list[Callable[[], None]]) -> None:
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
