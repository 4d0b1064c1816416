"""Losses that do not depend on how a batch is cut into microbatches.

A loss is a sum of parts (BERT: masked tokens and next sentence), each normalised by the count of its targets in the
whole batch. A microbatch contributes its share; the shares of all microbatches add up to the batch's loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vpipe.errors import ConfigError, ModelError
from vpipe.model.losses.probe import LossProbe, loss_of
from vpipe.model.losses.torch_losses import TorchLoss

__all__ = [
    "CallableLoss",
    "LearnedLoss",
    "Loss",
    "Metric",
    "ValuesRead",
    "as_loss",
    "exact_sum",
    "has_weights",
    "metrics_of",
    "sum_and_count",
    "sum_parts",
]


@runtime_checkable
class Loss(Protocol):
    """What the last stage computes for one microbatch."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Name the values and batch fields that the loss reads."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Name the parts, in the order in which they are added; known on every rank before anything has run."""

    def count(self, fields: Mapping[str, Tensor], num_samples: int) -> dict[str, float]:
        """Count the targets of each part in these batch fields; counts of microbatches add up."""

    def __call__(
        self, tensors: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        """Return each part's share: its sum over this microbatch, divided by the part's total."""


@dataclass(frozen=True)
class Metric:
    """A number that is told beside the loss and not trained on, such as the share of right answers.

    Args:
        function: takes the tensors that `inputs` names and returns one number, the mean over the samples it is given,
            or a pair of a sum and what that is divided by: both are added over the microbatches of a batch, and over
            all of an evaluation, so that a ratio is exact where samples have different numbers of targets.
        inputs: the values and batch fields that it reads, in its order; None: what the loss reads.
    """

    function: Callable[..., Any]
    inputs: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not callable(self.function) or isinstance(self.function, type):
            raise ModelError(
                f"a metric is {self.function!r}, not a function; give one of the last module's output and the batch's "
                "target that returns the mean over samples, or a pair (sum, count)"
            )


@dataclass(frozen=True)
class CallableLoss:
    """Wrap a function that returns one number for the samples it is given, such as those of `torch.nn.functional`.

    Of torch's own losses, of an output and a target, is known what they average over: targets that are not ignored, by
    the weights of their classes, or samples. Of others it is tried, on the first batch, whether they are the mean over
    samples; they are called a few times more for that.

    Args:
        function: takes the tensors that `inputs` names and returns one number.
        inputs: the values and batch fields that it reads, in its order.
        parts: the name of the number.
        reduction: `sum`: it adds over the samples it is given; `mean`: microbatches' losses are averaged, whatever it
            does, as a contrastive one wants it; None: as torch's losses say it, and for others it has to be a mean.
        num_targets: where the mean is not over samples: how many targets it is over, of those `inputs` that are batch
            fields, in their order.
        whole: those of `inputs` that are one for all samples; a chain enters its `whole_fields` here.
        metrics: what the function returns beside the number and is told, but not added to the loss. It returns a pair
            then, of the number and a dictionary with these names, or a dictionary with `loss` and these; each is as
            what a `Metric` returns. What else is in the dictionary is left out.

    Raises:
        ModelError: what is given does not go together.
    """

    function: Callable[..., Tensor]
    inputs: tuple[str, ...] = ("hidden", "target")
    parts: tuple[str, ...] = ("loss",)
    reduction: Literal["mean", "sum"] | None = None
    num_targets: Callable[..., float | Tensor] | None = None
    whole: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    _torch: TorchLoss | None = field(init=False, repr=False, compare=False)
    _probe: LossProbe = field(init=False, repr=False, compare=False, default_factory=LossProbe)

    def __post_init__(self) -> None:
        known = TorchLoss.of(self.function) if len(self.inputs) == 2 else None
        object.__setattr__(self, "_torch", known)
        if len(self.parts) != 1:
            raise ModelError(f"a function gives one number, and parts names {len(self.parts)}; give one name")
        if self.reduction not in (None, "mean", "sum"):
            raise ModelError(f"reduction is {self.reduction!r}; choose mean or sum")
        if known is not None and self.reduction not in (None, known.reduction):
            raise ModelError(
                f"reduction is {self.reduction!r}, and the loss itself has reduction={known.reduction!r}; leave the "
                "first out"
            )
        if self.num_targets is not None and self._is_sum:
            raise ModelError("a loss that adds over its targets does not count them; leave num_targets out")
        if isinstance(self.metrics, str):
            raise ModelError(f"metrics is {self.metrics!r}; give a tuple of names: metrics=({self.metrics!r},)")
        if known is not None and self.metrics:
            raise ModelError(
                f"torch's own losses return no {_quote(self.metrics)}; give a function for each: "
                f"metrics={{{self.metrics[0]!r}: function}} of a Pipeline or a Chain"
            )

    @property
    def _is_sum(self) -> bool:
        return "sum" in (self.reduction, self._torch.reduction if self._torch is not None else None)

    def count(self, fields: Mapping[str, Tensor], num_samples: int) -> dict[str, float]:
        """Count targets, where the mean is over them, or else samples."""
        return {self.parts[0]: self._count(fields, num_samples)}

    def _count(self, tensors: Mapping[str, Tensor], num_samples: int) -> float:
        given = [tensors[name] for name in self.inputs[1:] if name in tensors]
        if self.num_targets is not None:
            return float(self.num_targets(*given))
        if self._torch is not None and self._torch.by_targets and given:
            return self._torch.count(given[0])
        return float(num_samples)

    def __call__(
        self, tensors: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        """Return this microbatch's share; a batch without targets has a loss of zero.

        Raises:
            ModelError: the function does not return one number, or is no mean over samples.
        """
        return self.with_metrics(tensors, totals, num_samples)[0]

    def with_metrics(
        self, tensors: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return this microbatch's share, and sum and count of the metrics that the function returned beside it.

        Raises:
            ModelError: the function does not return what it has to, or is no mean over samples.
        """
        given = [tensors[name] for name in self.inputs]
        if self._torch is not None and all(isinstance(item, Tensor) for item in given):
            self._check_shapes(*given, is_cut=num_samples != next(iter(totals.values())))
            return self._torch_share(self._torch, tensors, totals, num_samples), {}
        value, beside = self._apart(self.function(*given))
        found = {name: sum_and_count(name, item, num_samples) for name, item in beside.items()}
        return self.share(value, tensors, totals, num_samples), found

    def _apart(self, returned: object) -> tuple[object, dict[str, object]]:
        """Return the loss and the metrics out of what the function returned."""
        value = loss_of(returned)
        beside = returned[1] if isinstance(returned, tuple) and value is not returned else returned
        if not isinstance(beside, Mapping) or value is returned:
            if self.metrics:
                raise ModelError(
                    f"the loss function returned {_kind(returned)}, and metrics names {_quote(self.metrics)} beside "
                    "the loss; return a pair of the loss and a dictionary that has them"
                )
            return returned, {}
        others = [name for name in beside if name != "loss"]
        if not self.metrics and others:
            raise ModelError(
                f"the loss function returned {_quote(map(str, others))} beside the loss; say which of these are "
                f"metrics, told and not added to the loss: vpipe.CallableLoss(function, metrics=({others[0]!r},))"
            )
        if missing := [name for name in self.metrics if name not in beside]:
            raise ModelError(
                f"the loss function returned {_quote(map(str, others)) or 'nothing'} beside the loss, and no "
                f"'{missing[0]}', which metrics names; return it, too, or leave the name out"
            )
        return value, {name: beside[name] for name in self.metrics}

    def _torch_share(
        self, known: TorchLoss, tensors: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        given = [tensors[name] for name in self.inputs]
        if not known.by_targets or self._is_sum:
            return self.share(self.function(*given), tensors, totals, num_samples)
        (total,) = totals.values()
        if not known.is_one_quotient and self._count(tensors, num_samples) == total > 0:
            return {self.parts[0]: self.function(*given)}
        return {self.parts[0]: known.summed(*given) / (total or 1.0)}

    def share(
        self, value: object, tensors: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        """Return the share of this microbatch, of which the function returned `value`.

        Raises:
            ModelError: that is not one number, or the function is no mean over samples.
        """
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ModelError(
                f"the loss function returned {_kind(value)}; it must return a tensor with one number, the mean over "
                "the samples it is given (reduction='mean')"
            )
        number = value.reshape(()) if value.dim() else value
        (part,), (total,) = self.parts, totals.values()
        if self._is_sum:
            return {part: number}
        count = self._count(tensors, num_samples)
        if count == total:
            # Where a microbatch is an update of its own there is nothing to weigh, nor to undo in the backward.
            return {part: number if count else torch.zeros_like(number)}
        if self._torch is None and self.num_targets is None and self.reduction is None and torch.is_grad_enabled():
            given = {name: tensors[name] for name in self.inputs}
            self._probe.look(self.function, given, self.whole, num_samples, total)
        # The mean over no targets is no number, and has no gradient that is one.
        return {part: number * (count / total) if count else torch.zeros_like(number)}

    def _check_shapes(self, output: Tensor, target: Tensor, *, is_cut: bool) -> None:
        assert self._torch is not None
        if is_cut and self._torch.is_elementwise and output.shape != target.shape:
            raise ModelError(
                f"the loss compares an output of shape {tuple(output.shape)} with a target of shape "
                f"{tuple(target.shape)}, each sample with each other one; give both the same shape"
            )
        weight = self._torch.sample_weight
        if is_cut and weight is not None and weight.dim() == target.dim() and weight.shape[0] > 1:
            raise ModelError(
                f"the loss has a weight of shape {tuple(weight.shape)}, a row for each sample of a batch, which is not "
                "cut into microbatches with it; make it a field of the batch that the loss reads: "
                "vpipe.CallableLoss(loss, inputs=('hidden', 'target', 'weight'))"
            )


@dataclass(frozen=True)
class LearnedLoss:
    """A loss with weights of its own: the last block computes it, so that they are trained as all others are."""

    loss: CallableLoss
    module: nn.Module
    """Where the weights come from."""
    value: ClassVar[str] = "learned_loss"
    """What the last block calls it."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Name the loss, and what it was computed of."""
        return (self.value, *self.loss.inputs)

    @property
    def parts(self) -> tuple[str, ...]:
        """Name the number."""
        return self.loss.parts

    def count(self, fields: Mapping[str, Tensor], num_samples: int) -> dict[str, float]:
        """Count targets or samples."""
        return self.loss.count(fields, num_samples)

    def __call__(
        self, tensors: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        """Return this microbatch's share."""
        return self.loss.share(tensors[self.value], tensors, totals, num_samples)


@dataclass(frozen=True)
class ValuesRead:
    """Stands for the loss of a chain that has none: says which values are wanted of it, and is never called."""

    inputs: tuple[str, ...]
    parts: ClassVar[tuple[str, ...]] = ()

    def count(self, fields: Mapping[str, Tensor], num_samples: int) -> dict[str, float]:
        """Count nothing."""
        return {}

    def __call__(
        self, tensors: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        """Return no parts."""
        return {}


def as_loss(loss: Loss | Callable[..., Tensor] | None) -> Loss:
    """Return the loss that is meant: a function stands for the mean that it is.

    Raises:
        ConfigError: it is neither a function nor a `Loss`.
    """
    if isinstance(loss, type):
        raise ConfigError(f"the loss is the class {loss.__name__}, not a function; make one: {loss.__name__}()")
    if not callable(loss):
        got = "none was given" if loss is None else f"got {type(loss).__name__}"
        raise ConfigError(
            f"modules need a loss, and {got}; give a function of the last module's output and the batch's target that "
            "returns the mean over samples, e.g. torch.nn.functional.mse_loss"
        )
    return loss if isinstance(loss, Loss) else CallableLoss(loss)


def has_weights(loss: object) -> bool:
    """Tell whether a loss has weights to train."""
    module = loss.function if isinstance(loss, CallableLoss) else loss
    return isinstance(module, nn.Module) and any(item.requires_grad for item in module.parameters())


def metrics_of(loss: Loss) -> tuple[str, ...]:
    """Name the metrics that a loss computes itself, beside its parts."""
    return loss.metrics if isinstance(loss, CallableLoss) else ()


def sum_and_count(name: str, value: object, num_samples: int) -> Tensor:
    """Return what metric `name` adds up to over a microbatch, and what that is divided by: two float64 numbers.

    A number stands for the mean over its samples, a pair of numbers is the two.

    Raises:
        ModelError: `value` is neither.
    """
    is_pair = isinstance(value, tuple | list) and len(value) == 2
    numbers = [_real(item) for item in (value if is_pair else [value])]  # type: ignore[attr-defined]
    if any(item is None for item in numbers):
        raise ModelError(
            f"metric '{name}' returned {_kind(value)}; it must return one number, the mean over the samples it is "
            "given, or a pair of numbers, a sum and what that is divided by"
        )
    total, *count = [item for item in numbers if item is not None]
    if not count:
        total, count = total * num_samples, [total.new_tensor(float(num_samples))]
    return torch.stack([total, count[0].to(total.device)])


def _real(value: object) -> Tensor | None:
    """Return one number in float64; None for what is none."""
    if isinstance(value, Tensor):
        return value.detach().reshape(()).double() if value.numel() == 1 and not value.is_complex() else None
    return torch.tensor(float(value), dtype=torch.float64) if isinstance(value, Real) else None


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" + (" of complex numbers" if value.is_complex() else "")
    if isinstance(value, tuple | list) and len(value) == 2:
        return f"a {type(value).__name__} of {_kind(value[0])} and {_kind(value[1])}"
    return type(value).__name__


def _quote(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def exact_sum(values: Iterable[float]) -> float:
    """Add numbers without rounding; NaN and infinities add up as they do elsewhere."""
    numbers = list(values)
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):  # of infinities of both signs, and of sums that are too large
        return sum(numbers)


def sum_parts(parts: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
    """Add a loss's parts in their order.

    Raises:
        ModelError: there are none.
    """
    tensors = list(parts.values()) if isinstance(parts, Mapping) else list(parts)
    if not tensors:
        raise ModelError("the loss returned no parts; it must return at least one, such as {'loss': value}")
    total = tensors[0]
    for part in tensors[1:]:
        total = total + part
    return total
