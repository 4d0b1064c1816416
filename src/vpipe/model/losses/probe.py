"""Whether a loss is the mean over the samples it is given, found out by giving it some of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vpipe.errors import ModelError
from vpipe.model.nested import Nest, take_apart
from vpipe.model.rng import noticing_draws

__all__ = ["LossProbe", "loss_of"]

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


def loss_of(returned: object) -> object:
    """Return the loss out of what a function returned: a pair of it and a dictionary, or a dictionary that has it."""
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        return returned[0]
    return returned["loss"] if isinstance(returned, Mapping) and "loss" in returned else returned


class _Samples(NamedTuple):
    """Rows of what a loss reads, of so many samples; None stands for what all samples share."""

    rows: tuple[Tensor | None, ...]
    number: int


class _Loss(NamedTuple):
    """A loss function, and how what it reads is put together of tensors called `names`."""

    function: Callable[..., Any]
    names: tuple[str, ...]
    nests: Mapping[str, Nest | None]

    def copied(self) -> Callable[[Sequence[Tensor]], Any]:
        """Return a function of the tensors that calls a copy of a module, which may keep something between calls."""
        call = _copied(self.function)

        def of_tensors(tensors: Sequence[Tensor]) -> Any:
            by_name = dict(zip(self.names, tensors, strict=True))
            return call(
                *(by_name[name] if nest is None else nest.put_together(by_name) for name, nest in self.nests.items())
            )

        return of_tensors


class LossProbe:
    """Looks at the microbatches of the first batch that is cut into several: each in halves, and beside the one before.

    The loss is called on copies of its tensors, four times for a microbatch.
    """

    def __init__(self) -> None:
        self._num_seen = 0
        self._is_done = False
        self._before: _Samples | None = None

    def look(
        self, function: Callable[..., Any], tensors: Mapping[str, Tensor], whole: Sequence[str], num: int, total: float
    ) -> None:
        """Compare the loss of some samples with the mean of its parts; what cannot be compared is believed.

        `num` samples of `total` are here; `whole` names what all samples share.

        Raises:
            ModelError: it is no mean over samples.
        """
        if self._is_done:
            return
        self._num_seen += num
        self._is_done = self._num_seen >= total
        try:
            apart = {name: take_apart(name, value) for name, value in tensors.items()}
        except ModelError:  # it reads something that cannot be shared out
            self._is_done = True
            return
        parts = {name: item for own, _ in apart.values() for name, item in own.items()}
        here = _rows_of(parts, [name for field in whole if field in apart for name in apart[field][0]], num)
        if here is None:
            self._is_done = True
            return
        shared, loss = (
            tuple(parts.values()),
            _Loss(function, tuple(parts), {name: nest for name, (_, nest) in apart.items()}),
        )
        if num > 1:
            self._compare(loss, shared, _cut(here, 0, num // 2), _cut(here, num // 2, num))
        if self._before is not None:
            self._compare(loss, shared, self._before, here)
        last = _cut(here, num - 1, num)
        self._before = None
        if not self._is_done:
            self._before = _Samples(tuple(row if row is None else row.clone() for row in last.rows), 1)

    def _compare(self, loss: _Loss, shared: Sequence[Tensor], one: _Samples, two: _Samples) -> None:
        for widened in (True, False):  # a sum of half precision is too far off to tell much
            try:
                found = _try(loss, shared, one, two, widened=widened)
            except Exception:  # it was never promised that the loss takes other numbers of samples, or another type
                continue
            if found is None:
                self._is_done = True
                return
            _judge(*found, (one.number, two.number))
            return
        self._is_done = True


def _rows_of(tensors: Mapping[str, Tensor], whole: Sequence[str], num: int) -> _Samples | None:
    """Return what has a row, or several, for each sample; None where that cannot be told."""
    # Flattened outputs have a row for each element of the targets.
    sizes = {num, *(item.numel() for item in tensors.values() if item.dim() and item.shape[0] == num)}
    rows: list[Tensor | None] = []
    for name, item in tensors.items():
        if name in whole:
            rows.append(None)
        elif item.dim() and item.shape[0] in sizes:
            rows.append(item.detach())
        else:
            return None
    return _Samples(tuple(rows), num)


def _cut(samples: _Samples, start: int, stop: int) -> _Samples:
    def part(row: Tensor) -> Tensor:
        each = row.shape[0] // samples.number
        return row[start * each : stop * each]

    return _Samples(tuple(row if row is None else part(row) for row in samples.rows), stop - start)


def _try(
    loss: _Loss, shared: Sequence[Tensor], one: _Samples, two: _Samples, *, widened: bool
) -> tuple[float, float, float, float] | None:
    """Return the loss of both parts, of all, and its precision; None where it is another one each time."""
    call = loss.copied()

    def value(*parts: _Samples) -> Tensor:
        given = []
        for index, item in enumerate(shared):
            rows = [part.rows[index] for part in parts]
            joined = (
                torch.cat([row for row in rows if row is not None]) if rows[0] is not None else item.detach().clone()
            )
            is_narrow = joined.is_floating_point() and joined.dtype.itemsize < 4
            given.append(joined.float() if widened and is_narrow else joined)
        return torch.as_tensor(loss_of(call(given)))

    with torch.no_grad(), noticing_draws() as has_drawn:
        first, second, whole = value(one), value(two), value(one, two)
        if has_drawn() or float(value(one)) != float(first):
            return None
    precision = torch.finfo(whole.dtype).eps if whole.is_floating_point() else 0.0
    return float(first), float(second), float(whole), precision


def _judge(first: float, second: float, whole: float, precision: float, numbers: tuple[int, int]) -> None:
    mean = (first * numbers[0] + second * numbers[1]) / sum(numbers)
    largest = max(abs(item) for item in (first, second, whole) if not math.isnan(item)) if whole == whole else 0.0
    allowed = max(_TOLERANCE, 32 * precision) * largest + 1e-6
    if not math.isfinite(whole) or abs(whole - mean) <= allowed:
        return
    is_sum = abs(whole - first - second) <= allowed
    raise ModelError(
        f"the loss is no mean over samples: of {sum(numbers)} samples it is {whole:.6g}, but {first:.6g} of "
        f"{numbers[0]} and {second:.6g} of {numbers[1]}, whose mean is {mean:.6g}"
        f"{' (their sum is right)' if is_sum else ''}. A batch is cut into microbatches, whose losses are averaged, so "
        f"it would be another loss than that of the whole batch. {_WAYS}"
    )


def _copied(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a module, which may keep something between calls; its weights are shared."""
    if not isinstance(function, nn.Module):
        return function
    return copy.deepcopy(function, {id(item): item for item in function.parameters()})
