"""A batch as the runtime sees it: some fields, and how many samples they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpipe.data.source import FieldSpec
from vpipe.errors import DataError
from vpipe.model.chain import Chain

__all__ = ["Batch", "BatchLike", "as_batch", "field_tensors"]


@dataclass(frozen=True)
class Batch:
    """One global batch; a rank needs only the fields that its stages read, but always the number of samples.

    Raises:
        DataError: a field is no tensor with one row per sample, or there are no samples.
    """

    fields: Mapping[str, Tensor]
    num_samples: int

    def __post_init__(self) -> None:
        for name, tensor in self.fields.items():
            if not isinstance(tensor, Tensor) or not tensor.ndim:
                kind = "a number" if isinstance(tensor, Tensor) else f"of type {type(tensor).__name__}"
                raise DataError(f"the field '{name}' is {kind}; a batch holds tensors with one row per sample")
            if tensor.shape[0] != self.num_samples:
                raise DataError(
                    f"the field '{name}' has {tensor.shape[0]} rows in a batch of {self.num_samples} samples; all "
                    "fields need one row per sample"
                )
        if self.num_samples < 1:
            raise DataError(f"a batch has {self.num_samples} samples; leave such batches out")


BatchLike = Batch | Mapping[str, Tensor] | Sequence[Tensor] | Tensor
"""A `Batch`, or tensors by field, or tensors in the order of the model's fields, or the only field's tensor."""


def as_batch(data: BatchLike, chain: Chain) -> Batch:
    """Turn what a user calls a batch into one.

    Raises:
        DataError: the number of tensors or their names are not those of the model's fields, or fields have different
            numbers of samples.
    """
    if isinstance(data, Batch):
        return data
    if not isinstance(data, Mapping):
        data = dict(_in_order([data] if isinstance(data, Tensor) else data, chain))
    if unknown := sorted(set(data).difference(chain.fields)):
        known = ", ".join(chain.fields)
        raise DataError(f"the batch has a field '{unknown[0]}' that the model does not read; it reads {known}")
    if not data:
        raise DataError(f"the batch has no fields; the model reads {', '.join(chain.fields)}")
    first = next(iter(data.values()))
    return Batch(data, first.shape[0] if isinstance(first, Tensor) and first.ndim else 0)


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
        specs = {name: FieldSpec(tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in batch.fields.items()}
        hint = "give all fields on every rank, or describe them with chain.with_field_specs"
    else:
        hint = "add it to the data or to the field_specs of the chain"
    if missing := [name for name in chain.fields if name not in specs]:
        raise DataError(
            f"the model reads the field '{missing[0]}', which the data does not have; it has "
            f"{', '.join(sorted(specs)) or 'none'}: {hint}"
        )
    return {
        name: torch.empty(specs[name].shape(num_samples), dtype=specs[name].dtype, device="meta")
        for name in chain.fields
    }
