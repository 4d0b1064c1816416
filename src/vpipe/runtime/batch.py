"""A batch as the runtime sees it: some fields, and how many samples they are of."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from dataclasses import fields as fields_of
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from vpipe.data.source import FieldSpec
from vpipe.errors import DataError, ModelError
from vpipe.model.chain import Chain
from vpipe.model.nested import map_tensors, take_apart, tensors_of

__all__ = ["Batch", "BatchLike", "as_batch", "as_input", "field_tensors"]


_WHOLE = "vpipe.Chain(..., whole_fields=('{name}',))"


@dataclass(frozen=True)
class Batch:
    """One global batch; a rank needs only the fields that its stages read, but always the number of samples.

    Args:
        fields: tensors with one row per sample, by name; or dictionaries, lists, dataclasses of such, in which None,
            numbers and words are for all samples.
        num_samples: how many rows.
        whole: fields that every microbatch gets as they are, such as a mask or the edges of a graph.

    Raises:
        DataError: a field is no tensor with one row per sample, or there are no samples.
    """

    fields: Mapping[str, Any]
    num_samples: int
    whole: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for field, value in self.fields.items():
            for name, tensor in _parts(field, value).items():
                self._check(name, tensor, is_whole=field in self.whole)
        self._check_number()

    def _check(self, name: str, tensor: Tensor, *, is_whole: bool) -> None:
        if tensor.ndim == 0 and not is_whole:
            raise DataError(
                f"the field '{name}' is a number; a batch holds tensors with one row per sample, and tensors of any "
                f"shape for all samples that are declared: {_WHOLE.format(name=name)}"
            )
        if tensor.grad_fn is not None:
            raise DataError(
                f"the field '{name}' was computed from what needs gradients ({tensor.grad_fn.name()}), and a "
                "pipeline gives none back to what made its batches; put that computation into the model, or "
                "detach its result: .detach()"
            )
        if not is_whole and tensor.shape[0] != self.num_samples:
            raise DataError(
                f"the field '{name}' has {tensor.shape[0]} rows in a batch of {self.num_samples} samples; all "
                f"fields need one row per sample{self._hint(tensor)}. What is for all samples together is "
                f"declared: {_WHOLE.format(name=name)}"
            )

    def rows(self, rows: slice) -> dict[str, Any]:
        """Return the fields of some samples."""
        return {
            name: value if name in self.whole else map_tensors(itemgetter(rows), value)
            for name, value in self.fields.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of all fields; those within a field have names of their own."""
        found: dict[str, Tensor] = {}
        for name, value in self.fields.items():
            found.update(_parts(name, value))
        return found

    def form(self) -> Hashable:
        """Return what batches have in common that differ in their numbers, and in how many samples they are of."""
        return tuple(
            (name, *_form(value, 0 if name in self.whole else 1)) for name, value in sorted(self.fields.items())
        )

    def _hint(self, odd: Tensor) -> str:
        """Return what may be meant by a field with another number of rows."""
        if odd.dim() > 1 and odd.shape[1] == self.num_samples:
            return ". If time comes first in it, let samples come first: tensor.transpose(0, 1), batch_first=True"
        others = [item for name, item in self.tensors().items() if item is not odd and name not in self.whole]
        if all(item.dim() > 1 and item.shape[1] == odd.shape[0] for item in others):
            return ". If time comes first in the others, let samples come first: .transpose(0, 1), batch_first=True"
        return ""

    def _check_number(self) -> None:
        if self.num_samples < 1:
            raise DataError(f"a batch has {self.num_samples} samples; leave such batches out")


BatchLike = Batch | Mapping[str, Any] | Sequence[Any] | Tensor
"""A `Batch`, or tensors by field, or tensors in the order of the model's fields, or the only field's tensor.

A namedtuple or a dataclass whose names are those of fields goes by them. Of what has all fields by name the rest is
left out.
"""


def _parts(field: str, value: Any) -> dict[str, Tensor]:
    """Return the tensors of a field; raise DataError where there is something beside them that cannot be shared out."""
    if isinstance(value, Tensor):
        return {field: value}
    if (listed := _plain_list(value)) is not None:
        raise DataError(
            f"the field '{field}' has a {type(listed).__name__} of {len(listed)} items that are no tensors; make it a "
            "tensor with one row per sample, e.g. torch.as_tensor(...)"
        )
    try:
        return take_apart(field, value)[0]
    except ModelError:
        raise DataError(
            f"the field '{field}' is of type {type(value).__name__}, or has something in it that is no tensor; a batch "
            "holds tensors with one row per sample, and dictionaries, lists and dataclasses of such with None, numbers "
            f"and words. What is for all samples is declared: {_WHOLE.format(name=field)}"
        ) from None


def _plain_list(value: Any) -> Sequence[Any] | None:
    """Return a list of what is no tensor, of which nobody can tell if it is for all samples or has one for each."""
    if isinstance(value, dict):
        return next((found for item in value.values() if (found := _plain_list(item)) is not None), None)
    if isinstance(value, list | tuple):
        if value and not hasattr(value, "_fields") and all(isinstance(item, int | float | str) for item in value):
            return value
        return next((found for item in value if (found := _plain_list(item)) is not None), None)
    return None


def _form(value: Any, start: int) -> tuple[Hashable, ...]:
    if isinstance(value, Tensor):
        return value.shape[start:], value.dtype
    parts, nest = take_apart("", value)
    return (str(nest), *((item.shape[start:], item.dtype) for item in parts.values()))


def as_batch(data: BatchLike, chain: Chain) -> Batch:
    """Turn what a user calls a batch into one.

    Raises:
        DataError: the number of tensors or their names are not those of the model's fields, or fields have different
            numbers of samples.
    """
    if isinstance(data, Batch):
        return data
    if (named := _named(data)) is not None and set(named) & set(chain.fields):
        data = named
    elif not isinstance(data, Mapping):
        data = dict(_in_order([data] if isinstance(data, Tensor) else data, chain))
    if not set(chain.fields).difference(data):
        data = {name: data[name] for name in chain.fields}
    if unknown := sorted(set(data).difference(chain.fields)):
        known = ", ".join(chain.fields)
        raise DataError(f"the batch has a field '{unknown[0]}' that the model does not read; it reads {known}")
    if not data:
        raise DataError(f"the batch has no fields; the model reads {', '.join(chain.fields)}")
    rows = (item for name, value in data.items() if name not in chain.whole_fields for item in tensors_of(value))
    num_samples = next((item.shape[0] for item in rows if item.ndim), 0)
    return Batch(data, num_samples, frozenset(chain.whole_fields))


def as_input(data: BatchLike, chain: Chain, wanted: Chain) -> Batch:
    """Turn what a user calls a batch into what `wanted` reads of it, which reads some of the fields of `chain`.

    What else `chain` reads may be there or not.

    Raises:
        DataError: as for `as_batch`.
    """
    if isinstance(data, Batch):
        fields = {name: item for name, item in data.fields.items() if name in wanted.fields}
        return Batch(fields, data.num_samples, data.whole)
    if (named := _named(data)) is not None and set(named) & set(chain.fields):
        data = named
    elif isinstance(data, Sequence) and len(data) == len(chain.fields):
        data = dict(zip(chain.fields, data, strict=True))
    if not isinstance(data, Mapping):
        return as_batch(data, wanted)
    read = {name: item for name, item in data.items() if name in wanted.fields or name not in chain.fields}
    if data and not read and wanted.field_specs is not None:
        # A rank that reads none of them still has to know how many samples there are.
        return replace(as_batch(data, chain), fields={})
    return as_batch(read, wanted)


def _named(data: object) -> dict[str, Tensor] | None:
    """Return the fields of a namedtuple or a dataclass by their names; None for other things."""
    if is_dataclass(data) and not isinstance(data, type):
        return {item.name: getattr(data, item.name) for item in fields_of(data)}
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return dict(zip(data._fields, data, strict=True))
    return None


def _in_order(tensors: Sequence[Tensor], chain: Chain) -> list[tuple[str, Tensor]]:
    if not isinstance(tensors, Sequence):
        raise DataError(
            f"a batch is of type {type(tensors).__name__}; give tensors in the order of the model's fields "
            f"({', '.join(chain.fields)}), a dictionary of them, or a vpipe.Batch"
        )
    if len(tensors) != len(chain.fields):
        raise DataError(
            f"the batch has {len(tensors)} tensors and the model reads {len(chain.fields)} fields: "
            f"{', '.join(chain.fields)}; give one for each, in this order, or a dictionary"
        )
    return list(zip(chain.fields, tensors, strict=True))


def field_tensors(chain: Chain, batch: Batch, num_samples: int) -> dict[str, Any]:
    """Return meta tensors like `num_samples` rows of the model's fields: as the chain has them, or else as `batch`.

    Raises:
        DataError: a field that the model reads is missing.
    """
    specs = chain.field_specs
    if specs is None:
        specs = {
            name: FieldSpec(tuple(tensor.shape[1:]), tensor.dtype)
            for name, tensor in batch.fields.items()
            if name not in batch.whole and isinstance(tensor, Tensor)
        }
        hint = "give all fields on every rank, or describe them with chain.with_field_specs"
    else:
        hint = "add it to the data or to the field_specs of the chain"
    whole = {
        name: map_tensors(lambda tensor: tensor.detach().to("meta"), batch.fields[name])
        for name in batch.whole
        if name in batch.fields
    }
    if chain.field_specs is None:
        whole |= {
            name: map_tensors(lambda tensor: tensor.new_empty((num_samples, *tensor.shape[1:]), device="meta"), value)
            for name, value in batch.fields.items()
            if name not in batch.whole and not isinstance(value, Tensor)
        }
    if missing := [name for name in chain.fields if name not in specs and name not in whole]:
        raise DataError(
            f"the model reads the field '{missing[0]}', which the data does not have; it has "
            f"{', '.join(sorted(specs)) or 'none'}: {hint}"
        )
    return whole | {
        name: torch.empty(specs[name].shape(num_samples), dtype=specs[name].dtype, device="meta")
        for name in chain.fields
        if name not in whole
    }
