"""Blocks out of a user's modules, each of which takes the previous one's tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vpipe.errors import ModelError
from vpipe.model.block import Block, ParameterRef, call_block
from vpipe.model.copying import check_memory, copy_module, like_parameter

__all__ = ["EndingBlock", "LossEnd", "Modules", "build_frozen", "chain_modules", "leaving_out_losses"]

Modules = nn.Sequential | nn.ModuleList | Sequence[nn.Module | Block]


@dataclass(frozen=True)
class LossEnd:
    """A loss that the last block computes: its module, what that reads, and what its value is called."""

    module: nn.Module
    inputs: tuple[str, ...]
    value: str


@dataclass(frozen=True)
class EndingBlock(Block):
    """A last block that computes the loss, too. `plain` is what it is without, of whose outputs the loss is made."""

    plain: Block = field(kw_only=True)


def chain_modules(
    modules: Modules, first_field: str, end: LossEnd | None = None
) -> tuple[tuple[Block, ...], tuple[tuple[ParameterRef, ...], ...]]:
    """Return the blocks of `modules` and the groups of parameters that several of them share.

    Raises:
        ModelError: `modules` is no list of modules and blocks, or one whose state is more than parameters is in it
            more than once, or parameters share their memory.
    """
    blocks: list[Block] = []
    places: dict[int, list[ParameterRef]] = {}
    owners: dict[int, str] = {}
    given: list[tuple[str, Tensor]] = []
    for name, item in _named_items(modules):
        if isinstance(item, Block):
            blocks.append(item)
            continue
        source = (*blocks[-1].outputs, first_field)[0] if blocks else first_field
        for local, parameter in item.named_parameters():
            places.setdefault(id(parameter), []).append(ParameterRef(len(blocks), local))
        _check_own_buffers(name, item, owners)
        given += _named_tensors(name, item)
        blocks.append(Block(name, _copying(item), (source,), ("hidden",)))
    if end is not None and blocks:
        _check_own_buffers("loss", end.module, owners)
        given += _named_tensors("loss", end.module)
        _place_loss(end.module, len(blocks) - 1, places)
        blocks[-1] = _ending(blocks[-1], end)
    check_memory(given)
    _check_hooks(blocks, places, given)
    return tuple(blocks), tuple(tuple(refs) for refs in places.values() if len(refs) > 1)


def _named_tensors(name: str, module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(f"{name}.{local}", item) for local, item in (*module.named_parameters(), *module.named_buffers())]


def _check_hooks(blocks: list[Block], places: dict[int, list[ParameterRef]], given: list[tuple[str, Tensor]]) -> None:
    """Refuse hooks of a shared parameter: each block's copy has a part of the gradient, and a hook wants the sum."""
    for _, tensor in given:
        refs = places.get(id(tensor), [])
        if len(refs) > 1 and (tensor._backward_hooks or tensor._post_accumulate_grad_hooks):
            names = " and ".join(f"'{blocks[ref.block].global_name(ref.name)}'" for ref in refs)
            raise ModelError(
                f"{names} are one weight with a hook for its gradient, of which each block has a part only; do what "
                "the hook does in a module that holds the weight, or in the optimizer"
            )


def _place_loss(loss: nn.Module, last: int, places: dict[int, list[ParameterRef]]) -> None:
    """Enter the parameters of a loss that becomes a part of block `last`, and how those of the block are called now."""
    for refs in places.values():
        refs[:] = [replace(ref, name=f"block.{ref.name}") if ref.block == last else ref for ref in refs]
    for local, parameter in loss.named_parameters():
        refs = places.setdefault(id(parameter), [])
        if any(ref.block == last for ref in refs):
            raise ModelError(
                f"the loss shares its weight '{local}' with the last module of the chain; let one module hold it and "
                "compute both"
            )
        refs.append(ParameterRef(last, f"loss.{local}"))


def _ending(block: Block, end: LossEnd) -> Block:
    """Return `block` with the loss behind it; it writes the loss and what it wrote before."""
    copied = _copying(end.module)
    return EndingBlock(
        block.name,
        lambda: _EndingInLoss(block, block.build(), end.inputs, copied()),
        tuple(dict.fromkeys((*block.inputs, *(name for name in end.inputs if name not in block.outputs)))),
        (end.value, *block.outputs),
        (*((f"block.{prefix}", name) for prefix, name in block.keys), ("block.", f"{block.name}."), ("loss.", "loss.")),
        plain=block,
    )


class _EndingInLoss(nn.Module):
    """A block's module, and the loss of what it returns."""

    def __init__(self, spec: Block, block: nn.Module, inputs: tuple[str, ...], loss: nn.Module) -> None:
        super().__init__()
        self.block, self.loss = block, loss
        self._spec, self._inputs = spec, inputs
        self.leaves_out = False
        """Whether it is run as the block alone."""
        self._names = tuple(dict.fromkeys((*spec.inputs, *(name for name in inputs if name not in spec.outputs))))

    def forward(self, *tensors: Any) -> Any:
        values = dict(zip(self._spec.inputs if self.leaves_out else self._names, tensors, strict=True))
        written = call_block(self._spec, self.block, values)
        values.update(written)
        if self.leaves_out:
            return tuple(written.values()) if len(written) > 1 else next(iter(written.values()))
        return (self.loss(*(values[name] for name in self._inputs)), *written.values())


@contextmanager
def leaving_out_losses(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let blocks that compute a loss do without, and without the fields that it reads."""
    ending = [module for module in modules if isinstance(module, _EndingInLoss)]
    for module in ending:
        module.leaves_out = True
    try:
        yield
    finally:
        for module in ending:
            module.leaves_out = False


def _named_items(modules: Modules) -> Iterator[tuple[str, nn.Module | Block]]:
    if not isinstance(modules, nn.Sequential | nn.ModuleList | Sequence):
        raise ModelError(
            f"a chain is made of an nn.Sequential or a list of modules, not of {type(modules).__name__}; "
            "list its layers in the order in which they run"
        )
    if isinstance(modules, nn.Module):
        _check_container(modules)
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


def _check_container(container: nn.Module) -> None:
    """Refuse what an nn.Sequential does beside running its items one after another, which nobody would do."""
    kind = type(container).__name__
    plain = nn.Sequential if isinstance(container, nn.Sequential) else nn.Module
    if "forward" in vars(container) or type(container).forward is not plain.forward:
        raise ModelError(
            f"the {kind} has a forward of its own, and a chain runs the items one after another without it; put what "
            "it does into modules, or list vpipe.Block(name, build, inputs, outputs) for items that take more than "
            "the previous one's tensor"
        )
    own = [*container.named_parameters(recurse=False), *container.named_buffers(recurse=False)]
    if own:
        raise ModelError(f"the {kind} holds '{own[0][0]}' beside its items; let the module that uses it hold it")
    if (
        container._forward_hooks
        or container._forward_pre_hooks
        or container._backward_hooks
        or container._backward_pre_hooks
    ):
        raise ModelError(
            f"the {kind} has hooks of its own, and a chain runs the items one after another without it; register them "
            "on its first or last item"
        )


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
    return lambda: module if torch.get_default_device().type == "meta" else copy_module(module)


def build_frozen(block: Block, names: frozenset[str]) -> nn.Module:
    """Build `block` with the weights of these model-wide names frozen.

    On the meta device, where modules made elsewhere come as they are, that is a copy.
    """
    module = block.build()
    if torch.get_default_device().type == "meta":
        tensors = {id(item): item.to("meta") for item in module.buffers()}
        tensors |= {id(item): like_parameter(item.detach().to("meta"), item) for item in module.parameters()}
        module = copy_module(module, dict(tensors))
    for local, parameter in module.named_parameters():
        if block.global_name(local) in names:
            parameter.requires_grad_(False)
    return module
