"""What blocks write, found by running them: on the meta device, where nothing is allocated, or else once in earnest."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vpipe.errors import ModelError
from vpipe.model.block import Block, Crossing, ValueSpec, call_block
from vpipe.model.copying import copy_module, like_parameter
from vpipe.model.modes import evaluating
from vpipe.model.nested import Nest, map_tensors, take_apart, tensors_of
from vpipe.model.rng import seeded, seeding_others

__all__ = ["build_on_meta", "infer", "leaf_of", "runs_on_meta", "specs_of"]

logger = logging.getLogger(__name__)

_Run = Callable[[int, Mapping[str, Any]], dict[str, Any]]


class _NotOnMeta(Exception):
    """A block does not run on the meta device; `reason` says why."""

    def __init__(self, block: str, reason: str) -> None:
        super().__init__(f"block '{block}': {reason}")
        self.reason = reason


def build_on_meta(block: Block) -> nn.Module:
    """Build a block's module without memory for its parameters; modules made elsewhere come as they are."""
    with torch.device("meta"):
        return block.build()


def infer(
    blocks: Sequence[Block],
    crossing: Callable[[int], Sequence[str]],
    build: Callable[[int], nn.Module],
    cuts: Sequence[int],
    fields: Mapping[str, Any],
    training: bool,
    device: torch.device | str,
) -> dict[int, Crossing]:
    """Return what crosses each of `cuts`, where the values that `crossing` names are alive; `build` makes a module.

    Raises:
        ModelError: a block cannot run, or writes another number of values than it declares.
    """
    on_meta = map_tensors(lambda tensor: tensor.detach().to("meta"), dict(fields))
    try:
        return _infer(cuts, crossing, on_meta, lambda index, values: _run_on_meta(blocks[index], values, training))
    except _NotOnMeta as error:
        problem = error  # outlives the clause

    def run(index: int, values: Mapping[str, Any]) -> dict[str, Any]:
        return _run_once(blocks[index], build(index).to(device), values, problem, training=training)

    specs = _infer(cuts, crossing, map_tensors(lambda tensor: _with_numbers(tensor, device), dict(fields)), run)
    found = "; ".join(f"before '{blocks[cut].name}' {_shown(specs[cut])}" for cut in cuts if cut < len(blocks))
    logger.info("not all blocks run on the meta device (%s). What one microbatch gave: %s", problem, found)
    return specs


def runs_on_meta(blocks: Sequence[Block], crossing: Callable[[int], Sequence[str]], fields: Mapping[str, Any]) -> bool:
    """Tell whether all blocks run on the meta device with such fields."""
    on_meta = map_tensors(lambda tensor: tensor.to("meta"), dict(fields))
    try:
        _infer([len(blocks)], crossing, on_meta, lambda index, values: _run_on_meta(blocks[index], values, True))
    except (ModelError, _NotOnMeta):
        return False
    return True


def _infer(
    cuts: Sequence[int], crossing: Callable[[int], Sequence[str]], batch: Mapping[str, Any], run: _Run
) -> dict[int, Crossing]:
    values: dict[str, Any] = dict(batch)
    specs: dict[int, Crossing] = {}
    last = max(cuts, default=0)
    with seeded(0), torch.enable_grad():
        for index in range(last + 1):
            if index in cuts:
                # As in a run, the next stage gets leaves, and nothing but what crosses.
                leaves = _enter_behind_cut({name: values[name] for name in crossing(index)})
                specs[index] = specs_of(leaves, batch)
                values = {**batch, **leaves}
            if index < last:
                values.update(run(index, values))
    return specs


def _with_numbers(tensor: Tensor, device: torch.device | str) -> Tensor:
    return torch.zeros_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device)


def _shown(specs: Iterable[ValueSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.shape} {str(spec.dtype).removeprefix('torch.')}" for spec in specs)


def _run_on_meta(block: Block, values: Mapping[str, Any], training: bool) -> dict[str, Any]:
    """Return what `block` writes for `values` of meta tensors, in the mode that it was built in or in an evaluation.

    Tensors that it makes itself are made on the meta device where it does not run otherwise.

    Raises:
        _NotOnMeta: it does not run on the meta device, or may write other types elsewhere.
        ModelError: it writes another number of values than it declares, or changes what crossed a cut in place.
    """
    try:
        return _on_meta(block, values, training=training)
    except _NotOnMeta:
        with torch.device("meta"):
            return _on_meta(block, values, training=training)


def _on_meta(block: Block, values: Mapping[str, Any], *, training: bool) -> dict[str, Any]:
    module = _apart(build_on_meta(block))
    tensors = {name: tensor.to("meta") for name, tensor in module.named_buffers()}
    for name, parameter in module.named_parameters():
        tensors[name] = like_parameter(parameter.detach().to("meta"), parameter)

    def call(*inputs: Any) -> Any:
        with _WithoutAutocast(block.name):
            return torch.func.functional_call(module, tensors, inputs)

    try:
        with _undisturbed(module, training=training):
            return call_block(block, call, values)
    except (ModelError, _NotOnMeta):
        raise
    except Exception as error:  # whatever its code meets there
        raise _NotOnMeta(block.name, _reason(error)) from error


def _run_once(
    block: Block, module: nn.Module, values: Mapping[str, Any], on_meta: _NotOnMeta, *, training: bool
) -> dict[str, Any]:
    """Return what `block`, of which `module` is made, writes for `values` of tensors with numbers.

    Raises:
        ModelError: it does not run; `on_meta` is why it, or one before it, does not on the meta device. Or it writes
            another number of values than it declares, or changes what crossed a cut in place.
    """
    try:
        with _undisturbed(module, training=training):
            return call_block(block, module, values)
    except ModelError:
        raise
    except Exception as error:  # whatever its code meets
        reason = _reason(error)
        other = "" if reason == on_meta.reason else f" (on the meta device, {on_meta})"
        shapes = ", ".join(f"{name} {_shape(values[name])}" for name in block.inputs)
        raise ModelError(
            f"block '{block.name}' cannot run with {shapes}: {reason}{other}. What crosses the cuts is found by "
            "running the blocks, on the meta device or else on one microbatch: check the sizes"
        ) from error


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"({type(value).__name__})"


def _apart(module: nn.Module) -> nn.Module:
    """Return a module that shares the tensors of a user's own one, and nothing else that a forward may write to."""
    return copy_module(module, {id(item): item for item in (*module.parameters(), *module.buffers())})


@contextmanager
def _undisturbed(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Run a forward that nobody sees: nothing is printed, and `random` and numpy go on as if it had not been."""
    with nullcontext() if training else evaluating([module]), seeding_others(0), redirect_stdout(io.StringIO()):
        yield


class _WithoutAutocast(TorchFunctionMode):
    """Refuses autocast, whose types depend on the device: on the meta device there is none."""

    def __init__(self, block: str) -> None:
        super().__init__()
        self._block = block

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
            raise _NotOnMeta(self._block, "there is no autocast")
        return function(*args, **(kwargs or {}))


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0].rstrip(".")
    return text if isinstance(error, RuntimeError) and text else f"{type(error).__name__}{text and ': '}{text}"


def leaf_of(value: Tensor) -> Tensor:
    """Return `value` as the stage after a cut gets it: with no graph behind it."""
    return value.detach().requires_grad_(value.requires_grad)


def _enter_behind_cut(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values that cross a cut as the stage behind it gets them; names of one tensor stay that."""
    leaves = {id(tensor): leaf_of(tensor) for value in values.values() for tensor in tensors_of(value)}
    return {name: map_tensors(lambda tensor: leaves[id(tensor)], value) for name, value in values.items()}


def specs_of(values: Mapping[str, Any], fields: Mapping[str, Any]) -> Crossing:
    """Return what a receiver must know of `values`, which cross a cut, beside the batch's `fields`.

    Raises:
        ModelError: something in a value can cross no cut.
    """
    tensors: dict[str, Tensor] = {}
    nests: dict[str, Nest] = {}
    for name, value in values.items():
        parts, nest = take_apart(name, value)
        tensors.update(parts)
        if nest is not None:
            nests[name] = nest
    beside = {
        f"{name}.{index}" if index else name: part
        for name, value in fields.items()
        for index, part in enumerate(tensors_of(value))
    }
    aliases = _find_aliases({**beside, **tensors})
    first: dict[int, str] = {}
    specs = (
        ValueSpec(
            name,
            tuple(value.shape),
            value.dtype,
            value.requires_grad,
            aliases.get(name),
            other if (other := first.setdefault(id(value), name)) != name else None,
        )
        for name, value in tensors.items()
    )
    return Crossing(specs, nests)


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
