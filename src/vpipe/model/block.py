"""The unit of cutting, and what it reads and writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vpipe.errors import ModelError

__all__ = ["Block", "ParameterRef", "ValueSpec", "call_block"]

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
    """What a value that crosses a cut looks like for one microbatch."""

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


def call_block(block: Block, module: Callable[..., object], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
    written = result if isinstance(result, tuple) else (result,)
    if len(written) != len(block.outputs) or not all(isinstance(item, Tensor) for item in written):
        kinds = ", ".join(type(item).__name__ for item in written)
        raise ModelError(
            f"block '{block.name}' declares {len(block.outputs)} outputs ({', '.join(block.outputs)}) but returned "
            f"{len(written)} ({kinds}); a block returns one tensor, or a tuple with one tensor per declared output: "
            "wrap a module that returns more, or list vpipe.Block(name, build, inputs, outputs) in its place"
        )
    return dict(zip(block.outputs, written, strict=True))
