"""Blocks out of a user's modules, each of which takes the previous one's tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from vpipe.errors import ModelError
from vpipe.model.block import Block, ParameterRef

__all__ = ["Modules", "chain_modules"]

Modules = nn.Sequential | nn.ModuleList | Sequence[nn.Module | Block]


def chain_modules(modules: Modules, first_field: str) -> tuple[tuple[Block, ...], tuple[tuple[ParameterRef, ...], ...]]:
    """Return the blocks of `modules` and the groups of parameters that several of them share.

    Raises:
        ModelError: `modules` is no list of modules and blocks, or one whose state is more than parameters is in it
            more than once.
    """
    blocks: list[Block] = []
    places: dict[int, list[ParameterRef]] = {}
    owners: dict[int, str] = {}
    for name, item in _named_items(modules):
        if isinstance(item, Block):
            blocks.append(item)
            continue
        source = (*blocks[-1].outputs, first_field)[0] if blocks else first_field
        for local, parameter in item.named_parameters():
            places.setdefault(id(parameter), []).append(ParameterRef(len(blocks), local))
        _check_own_buffers(name, item, owners)
        blocks.append(Block(name, _copying(item), (source,), ("hidden",)))
    return tuple(blocks), tuple(tuple(refs) for refs in places.values() if len(refs) > 1)


def _named_items(modules: Modules) -> Iterator[tuple[str, nn.Module | Block]]:
    if not isinstance(modules, nn.Sequential | nn.ModuleList | Sequence):
        raise ModelError(
            f"a chain is made of an nn.Sequential or a list of modules, not of {type(modules).__name__}; "
            "list its layers in the order in which they run"
        )
    # Not named_children(): that leaves out a module's second appearance.
    named = modules._modules.items() if isinstance(modules, nn.Module) else enumerate(modules)
    for name, item in named:
        if not isinstance(item, nn.Module | Block):
            raise ModelError(f"item {name} of the chain is of type {type(item).__name__}; give an nn.Module or a Block")
        if isinstance(item, nn.Module) and any(map(is_lazy, item.parameters())):
            raise ModelError(
                f"item {name} of the chain, {type(item).__name__}, has parameters without a shape; run the model once "
                "on a small batch, or give its sizes"
            )
        yield str(name), item


def _check_own_buffers(name: str, module: nn.Module, owners: dict[int, str]) -> None:
    """Refuse state that another item has, too: in one process both would write to it, on two stages neither knows."""
    # What is not in the state_dict is a constant, of which copies do no harm.
    saved = module.state_dict().keys()
    for local, buffer in module.named_buffers():
        if local in saved and (owner := owners.setdefault(id(buffer), name)) != name:
            raise ModelError(
                f"items {owner} and {name} of the chain share the buffer '{local}', and stages cannot keep it equal; "
                "use two modules, or register a constant with register_buffer(..., persistent=False)"
            )


def _copying(module: nn.Module) -> Callable[[], nn.Module]:
    """Return a builder of copies, so that building a block twice does not train one set of weights."""
    # What runs on the meta device writes no weights.
    return lambda: module if torch.get_default_device().type == "meta" else _copy(module)


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except RuntimeError as error:
        reason = str(error).split(".")[0]
        raise ModelError(
            f"a {type(module).__name__} of the chain cannot be copied: {reason}. It holds a tensor that was computed, "
            "as the old torch.nn.utils.weight_norm does; use torch.nn.utils.parametrizations, or compute it in forward"
        ) from error
