"""A batch as the runtime sees it: some fields, and how many samples they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from dataclasses import fields as fields_of

import torch
from torch import Tensor

from vpipe.data.source import FieldSpec
from vpipe.errors import DataError
from vpipe.model.chain import Chain

__all__ = ["Batch", "BatchLike", "as_batch", "as_input", "field_tensors"]


_WHOLE = "vpipe.Chain(..., whole_fields=('{name}',))"


@dataclass(frozen=True)
class Batch:
    """One global batch; a rank needs only the fields that its stages read, but always the number of samples.

    Args:
        fields: tensors with one row per sample, by name.
        num_samples: how many rows.
        whole: fields that every microbatch gets as they are, such as a mask or the edges of a graph.

    Raises:
        DataError: a field is no tensor with one row per sample, or there are no samples.
    """

    fields: Mapping[str, Tensor]
    num_samples: int
    whole: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name, tensor in self.fields.items():
            if not isinstance(tensor, Tensor) or not (tensor.ndim or name in self.whole):
                kind = "a number" if isinstance(tensor, Tensor) else f"of type {type(tensor).__name__}"
                raise DataError(
                    f"the field '{name}' is {kind}; a batch holds tensors with one row per sample, and tensors of any "
                    f"shape for all samples that are declared: {_WHOLE.format(name=name)}"
                )
            if tensor.grad_fn is not None:
                raise DataError(
                    f"the field '{name}' was computed from what needs gradients ({tensor.grad_fn.name()}), and a "
                    "pipeline gives none back to what made its batches; put that computation into the model, or "
                    "detach its result: .detach()"
                )
            if name not in self.whole and tensor.shape[0] != self.num_samples:
                raise DataError(
                    f"the field '{name}' has {tensor.shape[0]} rows in a batch of {self.num_samples} samples; all "
                    f"fields need one row per sample{self._hint(tensor)}. What is for all samples together is "
                    f"declared: {_WHOLE.format(name=name)}"
                )
        self._check_number()

    def rows(self, rows: slice) -> dict[str, Tensor]:
        """Return the fields of some samples."""
        return {name: tensor if name in self.whole else tensor[rows] for name, tensor in self.fields.items()}

    def _hint(self, odd: Tensor) -> str:
        """Return what may be meant by a field with another number of rows."""
        if odd.dim() > 1 and odd.shape[1] == self.num_samples:
            return ". If time comes first in it, let samples come first: tensor.transpose(0, 1), batch_first=True"
        others = [item for name, item in self.fields.items() if item is not odd and name not in self.whole]
        if all(item.dim() > 1 and item.shape[1] == odd.shape[0] for item in others):
            return ". If time comes first in the others, let samples come first: .transpose(0, 1), batch_first=True"
        return ""

    def _check_number(self) -> None:
        if self.num_samples < 1:
            raise DataError(f"a batch has {self.num_samples} samples; leave such batches out")


BatchLike = Batch | Mapping[str, Tensor] | Sequence[Tensor] | Tensor
"""A `Batch`, or tensors by field, or tensors in the order of the model's fields, or the only field's tensor.

A namedtuple or a dataclass whose names are those of fields goes by them.
"""


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
    if unknown := sorted(set(data).difference(chain.fields)):
        known = ", ".join(chain.fields)
        raise DataError(f"the batch has a field '{unknown[0]}' that the model does not read; it reads {known}")
    if not data:
        raise DataError(f"the batch has no fields; the model reads {', '.join(chain.fields)}")
    first = next((item for name, item in data.items() if name not in chain.whole_fields), None)
    num_samples = first.shape[0] if isinstance(first, Tensor) and first.ndim else 0
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


def field_tensors(chain: Chain, batch: Batch, num_samples: int) -> dict[str, Tensor]:
    """Return meta tensors like `num_samples` rows of the model's fields: as the chain has them, or else as `batch`.

    Raises:
        DataError: a field that the model reads is missing.
    """
    specs = chain.field_specs
    if specs is None:
        specs = {
            name: FieldSpec(tuple(tensor.shape[1:]), tensor.dtype)
            for name, tensor in batch.fields.items()
            if name not in batch.whole
        }
        hint = "give all fields on every rank, or describe them with chain.with_field_specs"
    else:
        hint = "add it to the data or to the field_specs of the chain"
    whole = {name: batch.fields[name].detach().to("meta") for name in batch.whole if name in batch.fields}
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
