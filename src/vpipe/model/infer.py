"""What blocks write, found by running them on the meta device, where nothing is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from vpipe.errors import ModelError
from vpipe.model.block import Block, ValueSpec, call_block
from vpipe.model.copying import like_parameter
from vpipe.model.modes import evaluating

__all__ = ["build_on_meta", "enter_behind_cut", "leaf_of", "run_on_meta", "specs_of"]


def build_on_meta(block: Block) -> nn.Module:
    """Build a block's module without memory for its parameters; modules made elsewhere come as they are."""
    with torch.device("meta"):
        return block.build()


def run_on_meta(block: Block, values: Mapping[str, Tensor], *, training: bool = True) -> dict[str, Tensor]:
    """Return what `block` writes for meta tensors `values`, in the mode that it was built in or in an evaluation.

    Raises:
        ModelError: it cannot run on the meta device, or writes another number of values than it declares.
    """
    module = build_on_meta(block)
    tensors = {name: tensor.to("meta") for name, tensor in module.named_buffers()}
    for name, parameter in module.named_parameters():
        tensors[name] = like_parameter(parameter.detach().to("meta"), parameter)
    try:
        with evaluating([] if training else [module]):
            return call_block(block, lambda *inputs: torch.func.functional_call(module, tensors, inputs), values)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).rstrip(".")
        shapes = ", ".join(f"{name} {tuple(values[name].shape)}" for name in block.inputs)
        raise ModelError(
            f"block '{block.name}' cannot run on the meta device with {shapes}: {reason}. Shapes are inferred there "
            "before anything is allocated: check the sizes, and keep control flow that depends on data, and in-place "
            "changes of what crossed a cut, out of blocks that are followed by a cut"
        ) from error


def leaf_of(value: Tensor) -> Tensor:
    """Return `value` as the stage after a cut gets it: with no graph behind it."""
    return value.detach().requires_grad_(value.requires_grad)


def enter_behind_cut(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return values that cross a cut as the stage behind it gets them; names of one tensor stay that."""
    leaves = {id(value): leaf_of(value) for value in values.values()}
    return {name: leaves[id(value)] for name, value in values.items()}


def specs_of(values: Mapping[str, Tensor], fields: Mapping[str, Tensor]) -> tuple[ValueSpec, ...]:
    """Return what a receiver must know of `values`, which cross a cut, beside the batch's `fields`."""
    aliases = _find_aliases({**fields, **values})
    first: dict[int, str] = {}
    return tuple(
        ValueSpec(
            name,
            tuple(value.shape),
            value.dtype,
            value.requires_grad,
            aliases.get(name),
            other if (other := first.setdefault(id(value), name)) != name else None,
        )
        for name, value in values.items()
    )


def _find_aliases(values: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each of `values` that shares elements in memory with another tensor the name of that one."""
    found: dict[str, str] = {}
    for (one, first), (two, second) in combinations(values.items(), 2):
        if first is second:
            continue
        if first.untyped_storage()._cdata == second.untyped_storage()._cdata and _elements(first) & _elements(second):
            found.setdefault(one, two)
            found.setdefault(two, one)
    return found


def _elements(value: Tensor) -> set[int]:
    """Return which bytes of its storage the elements of `value` begin at."""
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for size, stride in zip(value.shape, value.stride(), strict=True):
        places = (places.unsqueeze(-1) + torch.arange(size, device="cpu") * stride).flatten()
    return {value.element_size() * (value.storage_offset() + place) for place in places.tolist()}
