"""A model as a chain of blocks over named values.

A block reads values that earlier blocks wrote, or fields of the batch, and writes values. What crosses a cut is derived
from liveness: a value written before the cut and read after it, before anyone writes it again. Batch fields never cross
a cut: a stage that needs one reads it from the batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vpipe.data.source import FieldSpec
from vpipe.errors import ModelError
from vpipe.model.block import Block, Crossing, ParameterRef, ValueSpec, call_block
from vpipe.model.infer import build_on_meta, infer, runs_on_meta
from vpipe.model.initialise import initialise_meta
from vpipe.model.loss import CallableLoss, LearnedLoss, Loss, Metric, ValuesRead, as_loss, has_weights, metrics_of
from vpipe.model.modules import EndingBlock, LossEnd, Modules, build_frozen, chain_modules
from vpipe.model.rng import derive_seed, seeded

__all__ = ["Block", "Chain", "Crossing", "ParameterRef", "ValueSpec", "call_block"]


@dataclass(frozen=True)
class Chain:
    """Ordered blocks, the batch fields they may read, and the loss that follows the last one.

    `tied` lists groups of parameters in different blocks that are one weight: they start equal, as the group's first,
    and their gradients are summed in block order before every update.

    Raises:
        ModelError: a block reads a name that nobody wrote and that is no batch field, or writes only what nobody reads;
            names repeat; or a tied group does not fit the blocks.
    """

    blocks: tuple[Block, ...]
    fields: tuple[str, ...]
    loss: Loss
    tied: tuple[tuple[ParameterRef, ...], ...] = field(default=())
    whole_fields: tuple[str, ...] = ()
    """Those fields that every microbatch gets as they are, such as a mask or the edges of a graph: they have no row for
    each sample."""
    field_specs: Mapping[str, FieldSpec] | None = field(default=None, compare=False)
    """What the batch's fields look like, where batches hold only the fields that a rank needs; None: they hold all."""
    metrics: Mapping[str, Metric | Callable[..., Any]] = field(default_factory=dict)
    """What the last stage computes beside the loss, by name; a function reads what the loss reads. See `Metric`."""

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ModelError("a chain needs at least one block")
        _check_distinct("block names", [block.name for block in self.blocks])
        _check_distinct("batch fields", self.fields)
        _check_known("the declaration whole_fields", self.whole_fields, set(self.fields))
        self._check_loss()
        known = set(self.fields)
        for block in self.blocks:
            _check_known(f"block '{block.name}'", block.inputs, known)
            _check_distinct(f"the outputs of block '{block.name}'", block.outputs)
            if clash := sorted(set(block.outputs) & set(self.fields)):
                raise ModelError(f"block '{block.name}' writes '{clash[0]}', which is a batch field; rename its output")
            known.update(block.outputs)
        _check_known("the loss", self.loss.inputs, known)
        self._check_metrics(known)
        self._check_read()
        self._check_tied()

    def _check_loss(self) -> None:
        if isinstance(self.loss, CallableLoss) and self.loss.whole != self.whole_fields:
            object.__setattr__(self, "loss", replace(self.loss, whole=self.whole_fields))
        if not isinstance(self.loss, Loss):
            raise ModelError(
                f"the loss of a chain is of type {type(self.loss).__name__}; give vpipe.CallableLoss(function), or an "
                "object with the methods of vpipe.Loss"
            )
        if has_weights(self.loss):
            raise ModelError(
                "the loss has weights to train, and a chain trains those of its blocks; let the last block compute it "
                "from the batch's fields, as vpipe.Chain.from_modules(modules, loss) does with a loss module"
            )

    def _check_metrics(self, known: set[str]) -> None:
        if not isinstance(self.metrics, Mapping):
            raise ModelError(
                f"metrics is of type {type(self.metrics).__name__}; give a dictionary of functions by name, such as "
                "{'accuracy': function}"
            )
        usual = self.loss.loss.inputs if isinstance(self.loss, LearnedLoss) else self.loss.inputs
        made: dict[str, Metric] = {}
        for name, item in self.metrics.items():
            metric = item if isinstance(item, Metric) else Metric(item)
            made[name] = replace(metric, inputs=usual if metric.inputs is None else tuple(metric.inputs))
            _check_known(f"metric '{name}'", made[name].inputs or (), known)
        object.__setattr__(self, "metrics", made)
        names = [*metrics_of(self.loss), *made]
        _check_distinct("metrics", names)
        if clash := [name for name in names if name in ("loss", *self.loss.parts)]:
            raise ModelError(f"metric '{clash[0]}' has the name of the loss or of a part of it; rename the metric")

    @property
    def measured(self) -> dict[str, Metric]:
        """Return the metrics that are functions of their own."""
        return {name: item for name, item in self.metrics.items() if isinstance(item, Metric)}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Name what is told beside the loss: what the loss itself returns, and then the functions of their own."""
        return (*metrics_of(self.loss), *self.metrics)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Name what the last block writes, without a loss that it computes itself."""
        last = self.blocks[-1]
        return last.plain.outputs if isinstance(last, EndingBlock) else last.outputs

    @property
    def read_at_end(self) -> tuple[str, ...]:
        """Name the values and batch fields that the loss and the metrics read."""
        named = [name for item in self.measured.values() for name in item.inputs or ()]
        return tuple(dict.fromkeys((*self.loss.inputs, *named)))

    def without_loss(self) -> Chain:
        """Return the chain of the same blocks that reads no field which only the loss or a metric reads.

        It ends in no loss: it is for what the last block writes.
        """
        last = self.blocks[-1]
        blocks = (*self.blocks[:-1], last.plain if isinstance(last, EndingBlock) else last)
        read = {name for block in blocks for name in block.inputs}
        # What only loss and metrics read crosses the cuts as it does in an evaluation.
        written = [name for block in blocks for name in block.outputs if name in self.read_at_end]
        ending = ValuesRead(tuple(dict.fromkeys((*blocks[-1].outputs, *written))))
        specs = self.field_specs
        return Chain(
            blocks,
            tuple(name for name in self.fields if name in read),
            ending,
            whole_fields=tuple(name for name in self.whole_fields if name in read),
            field_specs=None if specs is None else {name: item for name, item in specs.items() if name in read},
        )

    def _check_read(self) -> None:
        needed = set(self.read_at_end)
        for block in reversed(self.blocks):
            if not needed & set(block.outputs):
                written = _quote(block.outputs) or "nothing"
                raise ModelError(
                    f"block '{block.name}' writes {written}, and neither a later block nor the loss reads it; "
                    f"what they read is {_quote(sorted(needed))}"
                )
            needed = (needed - set(block.outputs)) | set(block.inputs)

    def _check_tied(self) -> None:
        _check_distinct("tied parameters", [f"{ref.name} of block {ref.block}" for group in self.tied for ref in group])
        for group in self.tied:
            indices = [ref.block for ref in group]
            if len(indices) < 2 or indices != sorted(set(indices)):
                raise ModelError(
                    "a tied group names one parameter in each of two or more blocks, in block order; "
                    f"this one names blocks {indices}"
                )
            if indices[0] < 0 or indices[-1] >= len(self.blocks):
                raise ModelError(
                    f"a tied group names blocks {indices}; the chain has blocks 0 to {len(self.blocks) - 1}"
                )

    def __len__(self) -> int:
        return len(self.blocks)

    @classmethod
    def from_modules(
        cls,
        modules: Modules,
        loss: Loss | Callable[..., Tensor],
        *,
        fields: Sequence[str] = ("input", "target"),
        whole_fields: Sequence[str] = (),
        metrics: Mapping[str, Metric | Callable[..., Any]] | None = None,
    ) -> Chain:
        """Make a chain of modules that each take the previous one's tensor; the first takes the first of `fields`.

        Modules keep the weights they have: every materialised block is a copy. Modules on the meta device draw theirs
        when they are materialised. Parameters that several modules share become tied. Blocks may stand among the
        modules where one tensor is not enough; the module after one takes its first output.

        A function as loss is put into a `CallableLoss`. A module that has weights to train becomes a part of the last
        block; the weights' names begin with `loss.`.

        Raises:
            ConfigError: `loss` is no loss.
            ModelError: `modules` is no list of modules and blocks, or the chain does not fit together.
        """
        if not fields:
            raise ModelError("a chain of modules needs at least one batch field, which its first module takes")
        ending = as_loss(loss)
        if not isinstance(ending, CallableLoss) or not has_weights(ending):
            blocks, tied = chain_modules(modules, fields[0])
            return cls(blocks, tuple(fields), ending, tied, tuple(whole_fields), metrics=metrics or {})
        assert isinstance(ending.function, nn.Module)
        if ending.metrics:
            raise ModelError(
                f"a loss with weights of its own returns its number alone, and metrics names {_quote(ending.metrics)}; "
                "give a function for each: metrics={...} of the Pipeline or of the Chain"
            )
        learned = LearnedLoss(replace(ending, whole=tuple(whole_fields)), ending.function)
        blocks, tied = chain_modules(modules, fields[0], LossEnd(learned.module, ending.inputs, learned.value))
        return cls(blocks, tuple(fields), learned, tied, tuple(whole_fields), metrics=metrics or {})

    def with_field_specs(self, specs: Mapping[str, FieldSpec]) -> Chain:
        """Return the chain with what its batch fields look like, so that a batch may hold only those a rank needs."""
        return replace(self, field_specs=dict(specs))

    def crossing(self, cut: int) -> tuple[str, ...]:
        """Return the values alive between block `cut - 1` and block `cut`, in order of their first reader."""
        written = {name for block in self.blocks[:cut] for name in block.outputs}
        alive: dict[str, None] = {}
        overwritten: set[str] = set()
        for block in self.blocks[cut:]:
            alive.update((name, None) for name in block.inputs if name in written and name not in overwritten)
            overwritten.update(block.outputs)
        alive.update((name, None) for name in self.read_at_end if name in written and name not in overwritten)
        return tuple(alive)

    def fields_of(self, start: int, stop: int) -> tuple[str, ...]:
        """Return the batch fields that blocks `start` to `stop - 1` read, and what comes after the last of all."""
        names = [name for block in self.blocks[start:stop] for name in block.inputs]
        if stop == len(self.blocks):
            names += self.read_at_end
        return tuple(dict.fromkeys(name for name in names if name in self.fields))

    def count_parameters(self) -> tuple[int, ...]:
        """Return each block's number of parameter elements; a tied weight counts in every block that holds it."""
        return tuple(sum(p.numel() for p in build_on_meta(block).parameters()) for block in self.blocks)

    def parameter_sizes(self) -> list[dict[str, int]]:
        """Return for each block its trainable parameters' model-wide names and sizes, without allocating them.

        Raises:
            ModelError: two parameters have one name.
        """
        with torch.device("meta"):
            modules = [block.build() for block in self.blocks]
        sizes = [
            {
                block.global_name(name): parameter.numel()
                for name, parameter in module.named_parameters()
                if parameter.requires_grad
            }
            for block, module in zip(self.blocks, modules, strict=True)
        ]
        names = Counter(name for named in sizes for name in named)
        if repeated := [name for name, count in names.items() if count > 1]:
            raise ModelError(
                f"two parameters of the model have the name '{repeated[0]}'; change the blocks' keys so that names "
                "differ, and tie weights that are one with Chain(tied=...)"
            )
        return sizes

    def with_frozen(self, names: Collection[str]) -> Chain:
        """Return the chain with weights of these model-wide names frozen, whatever its blocks say."""
        frozen = frozenset(names)
        return replace(
            self, blocks=tuple(replace(block, build=partial(build_frozen, block, frozen)) for block in self.blocks)
        )

    def given_weights(self) -> dict[str, Tensor]:
        """Return those weights and buffers that are there already, by model-wide names: a user's own modules have them.

        What a block draws when it is built is not there yet.
        """
        with torch.device("meta"):
            modules = [block.build() for block in self.blocks]
        return {
            block.global_name(name): tensor
            for block, module in zip(self.blocks, modules, strict=True)
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
            if not tensor.is_meta
        }

    def trainable_sizes(self) -> list[int]:
        """Return each block's number of trainable parameter elements; a tied weight counts wherever it is held."""
        return [sum(named.values()) for named in self.parameter_sizes()]

    def materialise(self, index: int, seed: int, device: torch.device | str = "cpu") -> nn.Module:
        """Build block `index` with weights that depend on `seed` and `index` only, and move it to `device`.

        Weights are drawn on the CPU, so that they are the same on every kind of device. The default generators are left
        as they were.

        Raises:
            ModelError: the block's module lives on the meta device and cannot initialise itself, or a tied parameter is
                not there or has another shape than the first of its group.
        """
        module = self._build(index, seed)
        for group in self.tied:
            for ref in group[1:]:
                if ref.block == index:
                    first = group[0]
                    source = self._parameter(first, self._build(first.block, seed))
                    self._copy_tied(source, ref, module)
        return module.to(device)

    def _build(self, index: int, seed: int) -> nn.Module:
        block = self.blocks[index]
        with seeded(derive_seed(seed, "weights", index)), torch.device("cpu"):
            module = block.build()
            if not isinstance(module, nn.Module):
                raise ModelError(
                    f"build of block '{block.name}' returned {type(module).__name__}; it must return a torch.nn.Module"
                )
            return initialise_meta(block.name, module)

    def _parameter(self, ref: ParameterRef, module: nn.Module) -> nn.Parameter:
        try:
            return module.get_parameter(ref.name)
        except AttributeError as error:
            known = _quote(name for name, _ in module.named_parameters()) or "none"
            raise ModelError(
                f"block '{self.blocks[ref.block].name}' has no parameter '{ref.name}' to tie; it has {known}"
            ) from error

    def _copy_tied(self, source: nn.Parameter, ref: ParameterRef, module: nn.Module) -> None:
        target = self._parameter(ref, module)
        if target.shape != source.shape:
            raise ModelError(
                f"'{self.blocks[ref.block].global_name(ref.name)}' has shape {tuple(target.shape)} and is tied to a "
                f"parameter of shape {tuple(source.shape)}; tied parameters need equal shapes"
            )
        with torch.no_grad():
            target.copy_(source)

    def infer(
        self,
        cuts: Sequence[int],
        fields: Mapping[str, Tensor],
        *,
        training: bool = True,
        device: torch.device | str = "cpu",
    ) -> dict[int, Crossing]:
        """Return what crosses each of `cuts` for one microbatch, by running the blocks on the meta device.

        `fields` are tensors of one microbatch, of which only shape and type matter. If a block does not run on the meta
        device, all are run once on `device`: with the numbers of `fields`, or zeros for those that have none. Without
        `training` blocks are in evaluation mode. Blocks after the last cut are not run.

        Raises:
            ModelError: a cut is outside the chain, a field is missing, a block cannot run, or writes another number of
                values than it declares.
        """
        self._check_inferable(cuts, fields, self.blocks[: max(cuts, default=0)])
        return infer(self.blocks, self.crossing, lambda index: self._build(index, 0), cuts, fields, training, device)

    def runs_on_meta(self, fields: Mapping[str, Tensor]) -> bool:
        """Tell whether all blocks run on the meta device with such fields."""
        return runs_on_meta(self.blocks, self.crossing, fields)

    def _check_inferable(self, cuts: Sequence[int], fields: Mapping[str, Tensor], blocks: Sequence[Block]) -> None:
        if outside := [cut for cut in cuts if not 0 <= cut <= len(self.blocks)]:
            raise ModelError(f"cut {outside[0]} is outside the chain, which has cuts 0 to {len(self.blocks)}")
        for block in blocks:
            for name in block.inputs:
                if name in self.fields and name not in fields:
                    known = _quote(sorted(fields)) or "none"
                    raise ModelError(f"block '{block.name}' reads the batch field '{name}'; the batch has {known}")


def _quote(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _check_known(reader: str, names: Iterable[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise ModelError(
                f"{reader} reads '{name}', which no earlier block writes and which is no batch field; "
                f"known here: {_quote(sorted(known)) or 'nothing'}"
            )


def _check_distinct(what: str, names: Sequence[str]) -> None:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ModelError(f"{what} must differ; given more than once: {_quote(repeated)}")
