"""A model as a chain of blocks over named values.

A block reads values that earlier blocks wrote, or fields of the batch, and writes values. What crosses a cut is derived
from liveness: a value written before the cut and read after it, before anyone writes it again. Batch fields never cross a
cut: a stage that needs one reads it from the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vpipe.errors import ModelError
from vpipe.model.loss import Loss
from vpipe.model.rng import derive_seed, seed_everything

__all__ = ["Block", "Chain", "ParameterRef", "ValueSpec"]


@dataclass(frozen=True)
class Block:
    """The unit of cutting: a module, the names it reads and the names it writes.

    `build` makes the module, under whatever default device and random state are set. `keys` maps prefixes of the
    module's own `state_dict` names to prefixes of the model's; without it the block's name is put in front.
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

    @property
    def num_bytes(self) -> int:
        """Return the size of one such value in bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True)
class Chain:
    """Ordered blocks, the batch fields they may read, and the loss that follows the last one.

    `tied` lists groups of parameters in different blocks that are one weight: they start equal, and their gradients are
    summed in block order before every update.

    Raises:
        ModelError: a block reads a name that nobody wrote and that is no batch field, or names repeat.
    """

    blocks: tuple[Block, ...]
    fields: tuple[str, ...]
    loss: Loss
    tied: tuple[tuple[ParameterRef, ...], ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ModelError("a chain needs at least one block")
        names = [block.name for block in self.blocks]
        if len(set(names)) != len(names):
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise ModelError(f"block names must differ; {', '.join(repeated)} appear more than once")
        known = set(self.fields)
        for block in self.blocks:
            self._check_known(block.name, block.inputs, known)
            if clash := sorted(set(block.outputs) & set(self.fields)):
                raise ModelError(f"block '{block.name}' writes '{clash[0]}', which is a batch field; rename its output")
            known.update(block.outputs)
        self._check_known("the loss", self.loss.inputs, known)

    @staticmethod
    def _check_known(reader: str, names: Iterable[str], known: set[str]) -> None:
        for name in names:
            if name not in known:
                raise ModelError(
                    f"{reader} reads '{name}', which no earlier block writes and which is no batch field; "
                    f"known here: {', '.join(sorted(known))}"
                )

    def __len__(self) -> int:
        return len(self.blocks)

    @classmethod
    def from_modules(
        cls,
        modules: nn.Sequential | Sequence[nn.Module | Block],
        loss: Loss,
        *,
        fields: Sequence[str] = ("input", "target"),
    ) -> Chain:
        """Make a chain of modules that each take the previous one's tensor; the first takes the first of `fields`.

        Modules keep the weights they have; modules on the meta device are materialised on the rank that owns them.
        Blocks may stand among the modules where one tensor is not enough.
        """
        items = list(modules.named_children()) if isinstance(modules, nn.Sequential) else list(enumerate(modules))
        blocks: list[Block] = []
        for index, (name, item) in enumerate(items):
            if isinstance(item, Block):
                blocks.append(item)
                continue
            source = blocks[-1].outputs[0] if index else fields[0]
            keys = (("", f"{name}."),)
            blocks.append(Block(str(name), _existing(item), (source,), ("hidden",), keys))
        return cls(tuple(blocks), tuple(fields), loss)

    def crossing(self, cut: int) -> tuple[str, ...]:
        """Return the values alive between block `cut - 1` and block `cut`, in order of their first reader."""
        written = {name for block in self.blocks[:cut] for name in block.outputs}
        alive: dict[str, None] = {}
        overwritten: set[str] = set()
        for block in self.blocks[cut:]:
            alive.update((name, None) for name in block.inputs if name in written and name not in overwritten)
            overwritten.update(block.outputs)
        alive.update((name, None) for name in self.loss.inputs if name in written and name not in overwritten)
        return tuple(alive)

    def fields_of(self, start: int, stop: int) -> tuple[str, ...]:
        """Return the batch fields that blocks `start` to `stop - 1` read, and the loss where the last block is among them."""
        names = [name for block in self.blocks[start:stop] for name in block.inputs]
        if stop == len(self.blocks):
            names += self.loss.inputs
        return tuple(dict.fromkeys(name for name in names if name in self.fields))

    def materialise(self, index: int, seed: int, device: torch.device | str = "cpu") -> nn.Module:
        """Build block `index` on `device` with weights that depend on `seed` and `index` only.

        Raises:
            ModelError: the block's module lives on the meta device and cannot initialise itself.
        """
        block = self.blocks[index]
        state = torch.get_rng_state()
        try:
            seed_everything(derive_seed(seed, "weights", index))
            with torch.device(device):
                module = block.build()
            if any(tensor.is_meta for tensor in module.state_dict().values()):
                _initialise(block.name, module.to_empty(device=device))
            return module.to(device)
        finally:
            torch.set_rng_state(state)

    def infer(self, cuts: Sequence[int], fields: Mapping[str, Tensor]) -> dict[int, tuple[ValueSpec, ...]]:
        """Return what crosses each of `cuts` for one microbatch, by running the blocks on the meta device.

        `fields` are meta tensors of one microbatch. Blocks after the last cut are not run.

        Raises:
            ModelError: a block cannot run on the meta device, or writes another number of values than it declares.
        """
        values: dict[str, Tensor] = dict(fields)
        specs: dict[int, tuple[ValueSpec, ...]] = {}
        state = torch.get_rng_state()
        for index in range(max(cuts, default=0) + 1):
            if index in cuts:
                specs[index] = tuple(_spec(name, values[name]) for name in self.crossing(index))
            if index < max(cuts, default=0):
                values.update(_run_on_meta(self.blocks[index], values))
        torch.set_rng_state(state)
        return specs


def call_block(block: Block, module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run one block on the values it reads and return the values it writes.

    Raises:
        ModelError: it writes another number of values than it declares.
    """
    result = module(*(values[name] for name in block.inputs))
    written = result if isinstance(result, tuple) else (result,)
    if len(written) != len(block.outputs) or not all(isinstance(item, Tensor) for item in written):
        kinds = ", ".join(type(item).__name__ for item in written)
        raise ModelError(
            f"block '{block.name}' declares {len(block.outputs)} outputs ({', '.join(block.outputs)}) but returned "
            f"{len(written)} ({kinds}); a block returns one tensor, or a tuple with one tensor per declared output"
        )
    return dict(zip(block.outputs, written, strict=True))


def _existing(module: nn.Module) -> Callable[[], nn.Module]:
    return lambda: module


def _spec(name: str, value: Tensor) -> ValueSpec:
    return ValueSpec(name, tuple(value.shape), value.dtype, value.requires_grad)


def _run_on_meta(block: Block, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.device("meta"):
        module = block.build()
    tensors = {name: tensor.to("meta") for name, tensor in module.named_buffers()}
    for name, parameter in module.named_parameters():
        tensors[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    inputs = tuple(values[name] for name in block.inputs)
    try:
        result = torch.func.functional_call(module, tensors, inputs)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        shapes = ", ".join(f"{name} {tuple(values[name].shape)}" for name in block.inputs)
        raise ModelError(
            f"block '{block.name}' cannot run on the meta device with {shapes}: {error}. Shapes are inferred there before "
            "anything is allocated: check the sizes, and keep data-dependent control flow out of blocks that are followed by a cut"
        ) from error
    return call_block(block, lambda *_: result, values)  # type: ignore[arg-type]


def _initialise(name: str, module: nn.Module) -> None:
    for path, child in module.named_modules():
        if not list(child.parameters(recurse=False)) and not list(child.buffers(recurse=False)):
            continue
        reset = getattr(child, "reset_parameters", None)
        if not callable(reset):
            raise ModelError(
                f"block '{name}' was made on the meta device and its part '{path}' ({type(child).__name__}) has no "
                "reset_parameters(); give it one, or build the block from a factory: Block(name, build, inputs, outputs)"
            )
        reset()
