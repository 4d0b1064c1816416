"""See every operation that torch runs: its floating-point operations, the bytes it moves, what is alive meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["Seen", "Storages", "Watch"]

aten = torch.ops.aten

_UNWRITTEN = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
"""Make memory and leave it as it is."""
_GATHERING = (aten.embedding, aten.index_select, aten.gather, aten.index, aten.nll_loss_forward)
"""Read only as much of their first input as they write."""


@dataclass(frozen=True)
class Seen:
    """One operation."""

    name: str
    flops: int
    num_bytes: int
    shapes: tuple[tuple[int, ...], ...]
    """Of the tensors it reads."""
    reads: tuple[int, ...]
    """Numbers of the storages it reads."""
    writes: tuple[int, ...]


class Storages:
    """Memory that tensors lie in, by a number that is never used again, and how much of it is alive."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.alive_bytes = self.peak_bytes = 0
        self._numbers: dict[int, int] = {}

    def number(self, tensor: Tensor) -> int:
        """Return the number of the storage of a tensor; one that is new counts as alive until it is freed."""
        storage = tensor.untyped_storage()
        place = storage._cdata  # tensors without memory have no address
        if place not in self._numbers:
            number = len(self.sizes)
            self._numbers[place] = number
            self.sizes[number] = storage.nbytes()
            self.alive_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.alive_bytes)
            weakref.finalize(storage, self._forget, place, storage.nbytes()).atexit = False
        return self._numbers[place]

    def numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        """Return the numbers of several tensors' storages."""
        return {self.number(tensor) for tensor in tensors}

    def total(self, numbers: Iterable[int]) -> int:
        """Return the size of some storages together."""
        return sum(self.sizes[number] for number in set(numbers))

    def _forget(self, place: int, num_bytes: int) -> None:
        del self._numbers[place]
        self.alive_bytes -= num_bytes


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, list in `seen` every operation that moves memory.

    Positions of non-zeros, which depend on values that are not there, are as many as `share` of the elements.
    """

    def __init__(self, storages: Storages, share: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Seen] = []
        self._storages = storages
        self._share = share

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        packet = func.overloadpacket
        if packet is aten.nonzero:
            number = round(self._share * args[0].numel())
            return torch.empty((number, args[0].dim()), dtype=torch.int64, device=args[0].device)
        result = func(*args, **kwargs)
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(result))
        read = [self._storages.number(tensor) for tensor in inputs]
        written = self._storages.numbers(outputs)
        is_view = written <= set(read) and not func._schema.is_mutable
        if outputs and not is_view and packet not in _UNWRITTEN:
            self.seen.append(
                Seen(
                    str(packet).removeprefix("aten."),
                    _flops(packet, args, kwargs, result),
                    _moved(packet, inputs, outputs),
                    tuple(tuple(tensor.shape) for tensor in inputs),
                    tuple(read),
                    tuple(written),
                )
            )
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _flops(packet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int:
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


def _moved(packet: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    written = sum(map(_size, outputs))
    if packet in _GATHERING:
        return 2 * written + sum(map(_size, inputs[1:]))
    return written + sum(map(_size, inputs))


def _size(tensor: Tensor) -> int:
    """Return the bytes that a tensor spans, of which those that it repeats count once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
