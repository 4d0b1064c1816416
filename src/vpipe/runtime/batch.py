"""A batch as the runtime sees it: some fields, and how many samples they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpipe.data.source import FieldSpec
from vpipe.errors import DataError
from vpipe.model.chain import Chain

__all__ = ["Batch", "as_batch", "field_tensors"]


@dataclass(frozen=True)
class Batch:
    """One global batch; a rank needs only the fields that its stages read, but always the number of samples."""

    fields: Mapping[str, Tensor]
    num_samples: int


def as_batch(data: Batch | Mapping[str, Tensor] | Sequence[Tensor], chain: Chain) -> Batch:
    """Accept a `Batch`, fields by name, or a tuple in the order of the chain's fields.

    Raises:
        DataError: names are unknown, or fields have different numbers of samples.
    """
    if isinstance(data, Batch):
        return data
    if not isinstance(data, Mapping):
        if len(data) != len(chain.fields):
            raise DataError(f"a batch has {len(data)} tensors but the model reads {len(chain.fields)}: {chain.fields}")
        data = dict(zip(chain.fields, data, strict=True))
    if unknown := sorted(set(data) - set(chain.fields)):
        raise DataError(f"a batch has a field '{unknown[0]}' that the model does not read; it reads {chain.fields}")
    sizes = {name: len(tensor) for name, tensor in data.items()}
    if len(set(sizes.values())) != 1:
        raise DataError(f"the fields of a batch must have the same number of samples, got {sizes}")
    return Batch(data, next(iter(sizes.values())))


def field_tensors(
    chain: Chain, batch: Batch, specs: Mapping[str, FieldSpec] | None, num_samples: int
) -> dict[str, Tensor]:
    """Return meta tensors like `num_samples` rows of the model's fields, from `specs` or else from `batch`.

    Raises:
        DataError: a field that the model reads is missing.
    """
    if specs is None:
        specs = {name: FieldSpec(tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in batch.fields.items()}
    if missing := [name for name in chain.fields if name not in specs]:
        raise DataError(
            f"the model reads the field '{missing[0]}', which the data does not have; it has {sorted(specs)}"
        )
    return {
        name: torch.empty((num_samples, *specs[name].shape_per_sample), dtype=specs[name].dtype, device="meta")
        for name in chain.fields
    }
