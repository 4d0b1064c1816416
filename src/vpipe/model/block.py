"""The unit of cutting, and what it reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vpipe.errors import ModelError
from vpipe.model.nested import Nest

__all__ = ["Block", "Crossing", "ParameterRef", "ValueSpec", "call_block", "nests_of", "parts_of", "split_written"]

_IN_PLACE = (
    "a leaf Variable that requires grad is being used in an in-place",
    "of _Gate is a view and is being",
)
"""How torch says that an operation may not write to what enters a stage."""


@dataclass(frozen=True)
class Block:
    """The unit of cutting: a module, the names it reads and the names it writes.

    `build` makes the module, under whatever default device and random state are set. `keys` maps prefixes of the
    module's own `state_dict` names to prefixes of the model's, first match first; without a match the block's name is
    put in front.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    keys: tuple[tuple[str, str], ...] = ()

    def global_name(self, local: str) -> str:
        """Return the model-wide name of the block's parameter or buffer `local`."""
        for prefix, replacement in self.keys:
            if local.startswith(prefix):
                return replacement + local[len(prefix) :]
        return f"{self.name}.{local}"


@dataclass(frozen=True)
class ParameterRef:
    """A parameter by the index of its block and its name inside the block's module."""

    block: int
    name: str


@dataclass(frozen=True)
class ValueSpec:
    """What a tensor that crosses a cut looks like for one microbatch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    alias: str | None = None
    """Another value or batch field that stands on the same memory, where a change in place changes both."""
    same_as: str | None = None
    """Another value that is the very same tensor: that one crosses for both, and gets the gradients of both."""

    @property
    def num_bytes(self) -> int:
        """Return the size of one such value in bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class Crossing(tuple[ValueSpec, ...]):
    """What crosses a cut: its tensors, and in `nests` how values that are more than a tensor are put together."""

    nests: Mapping[str, Nest]

    def __new__(cls, specs: Iterable[ValueSpec], nests: Mapping[str, Nest]) -> Crossing:
        """Join both."""
        made = super().__new__(cls, specs)
        made.nests = nests
        return made

    def __str__(self) -> str:
        return f"{super().__str__()} {dict(self.nests)}" if self.nests else super().__str__()


def nests_of(crossing: Sequence[ValueSpec]) -> Mapping[str, Nest]:
    """Return which values that cross are more than a tensor, and how these are put together."""
    return crossing.nests if isinstance(crossing, Crossing) else {}


def parts_of(crossing: Sequence[ValueSpec], names: Iterable[str]) -> tuple[str, ...]:
    """Return what the tensors of values `names` are called where they cross."""
    nests = nests_of(crossing)
    return tuple(part for name in names for part in (nests[name].names if name in nests else (name,)))


def call_block(block: Block, module: Callable[..., object], values: Mapping[str, Any]) -> dict[str, Any]:
    """Run one block on the values it reads and return the values it writes.

    Raises:
        ModelError: it writes another number of values than it declares, or changes what crossed a cut in place.
    """
    try:
        result = module(*(values[name] for name in block.inputs))
    except RuntimeError as error:
        if not any(words in str(error) for words in _IN_PLACE):
            raise
        raise ModelError(
            f"block '{block.name}' changes an input in place that comes from the stage before; make the operation one "
            "that is not in place (such as inplace=False), or cut somewhere else"
        ) from error
    return split_written(block, result)


def split_written(block: Block, result: Any) -> dict[str, Any]:
    """Return the values in what a block's module returned: that itself is the only one, or its items are several.

    Raises:
        ModelError: it returned another number of values than the block declares.
    """
    names = block.outputs
    if len(names) == 1:
        return {names[0]: result}
    if not isinstance(result, tuple | list) or len(result) != len(names):
        items = f"{len(result)} in a" if isinstance(result, tuple | list) else "a"
        raise ModelError(
            f"block '{block.name}' declares {len(names)} outputs ({', '.join(names)}) but returned {items} "
            f"{type(result).__name__}; a block that declares several returns a tuple with one value for each"
        )
    return dict(zip(names, result, strict=True))
