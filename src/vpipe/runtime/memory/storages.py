"""Where the memory of tensors lies, of whatever kind they are."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

__all__ = ["num_bytes", "place_of", "sizes_of"]


def place_of(tensor: Tensor) -> int:
    """Return where the memory of a tensor begins."""
    return tensor.untyped_storage().data_ptr()


def sizes_of(tensors: Iterable[Tensor], shared: Container[int] = ()) -> dict[int, int]:
    """Return place and bytes of the storages under `tensors`, but for those at the places `shared`."""
    found = {}
    for tensor in tensors:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            if (place := storage.data_ptr()) and place not in shared:
                found[place] = storage.nbytes()
    return found


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Add up the storages under `tensors`, each once."""
    return sum(sizes_of(tensors).values())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors with memory of which one is made: those of a sparse one, and what a transform has wrapped."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    if tensor._is_zerotensor():  # the tangent of what has none
        return
    if tensor.layout is torch.strided:
        yield tensor
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
