"""A model, a loss, an optimizer and a schedule: the training step, pipelined.

This is the library's front door. It ties the other parts together and owns nothing but their order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import chain as concatenate
from itertools import groupby, islice
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vpipe.data.source import FieldSpec
from vpipe.errors import ConfigError, DataError, NonFiniteLossError
from vpipe.model.chain import Block, Chain, ValueSpec
from vpipe.model.loss import CallableLoss
from vpipe.runtime.agreement import agree
from vpipe.runtime.assembly import (
    OptimizerFactory,
    RecomputeMode,
    build_stages,
    crossing_specs,
    parameter_sizes,
    resolve_partition,
    tied_groups,
)
from vpipe.runtime.batch import Batch, as_batch, field_tensors
from vpipe.runtime.board import LossBoard
from vpipe.runtime.executor import Executor, Program, Record
from vpipe.runtime.feed import BatchFeed
from vpipe.runtime.process_group import ProcessGroup, destroy_process_group, initialise_process_group
from vpipe.runtime.programs import ProgramBuilder
from vpipe.runtime.transport import Transport
from vpipe.runtime.update import Updater
from vpipe.schedule.action import Action

__all__ = ["Pipeline", "StepResult"]

_EVALUATED_TOGETHER = 32
_TIMEOUT_SECONDS = 300.0

Data = Batch | Mapping[str, Tensor] | Sequence[Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one batch gave; the same on every rank, but for the norm in asynchronous schedules."""

    iteration: int
    """Batches done before this one."""
    loss: float
    parts: Mapping[str, float]
    """What the loss is the sum of."""
    gradient_norm: float | None
    """Before clipping, over all stages; in asynchronous schedules of this rank's stage. None without clipping."""


def _ignore(action: Action, start_ns: int, end_ns: int) -> None:
    """Record nothing."""


@dataclass
class Hooks:
    """What a caller may watch. None of it changes what is computed."""

    record: Record = field(default=_ignore)
    """Called after each action."""
    announce: Callable[[str], None] = field(default=lambda text: None)
    """Called before the rank waits for something."""
    gradients: Callable[[int, int, Mapping[str, Tensor]], None] | None = None
    """Called before each update with stage, microbatch and the gradients by name."""


class Pipeline:
    """Trains a chain of blocks that is spread over the ranks of the default process group.

    Every rank makes the same `Pipeline` and gives it the same batches; each builds and trains only its own stages.

    Args:
        model: a `Chain`, or modules that each take the previous one's tensor.
        loss: a function of the last module's output and the batch's target that returns a mean over samples; not for a `Chain`.
        optimizer: makes the optimizer of one stage from its (name, parameter) pairs, as every torch optimizer takes them.
        schedule: a name from `vpipe schedule --list`.
        num_microbatches: slices of a batch; in an asynchronous schedule each one is an update of its own.
        partition: blocks per stage, `uniform` (default) or `parameters`.
        stages_per_rank: stages that each rank holds, where the schedule has it.
        recompute_ratio: per stage or for all, the trailing share of blocks that keep no activations.
        recompute: for which microbatches: `always`, `except_last` of a batch, `never`.
        depths: warmup forwards per stage, more than the schedule's own hide latency (`stage_to_depth_map`).
        macrobatch: asynchronous, but one update per batch and two weight versions (PipeDream-2BW).
        vertical_sync: asynchronous with one weight version per microbatch on all stages.
        clip_grad_norm: largest gradient norm, over all stages (asynchronous: over each stage).
        learning_rate: the rate as a function of iterations done, instead of the optimizer's own.
        seed: for initial weights and dropout.
        device: where this rank computes.
        field_specs: what the batch's fields look like, where batches hold only the fields that a rank needs.
        hooks: what the caller wants to watch.

    Raises:
        ConfigError, PlanError, ScheduleError, ModelError: what was given does not fit together.
    """

    def __init__(
        self,
        model: Chain | nn.Sequential | Sequence[nn.Module | Block],
        loss: Callable[..., Tensor] | None = None,
        *,
        optimizer: OptimizerFactory,
        schedule: str = "1f1b",
        num_microbatches: int | None = None,
        partition: Sequence[int] | str | None = None,
        stages_per_rank: int = 1,
        recompute_ratio: float | Sequence[float] = 0.0,
        recompute: RecomputeMode = "always",
        depths: Sequence[int] | None = None,
        macrobatch: bool = False,
        vertical_sync: bool = False,
        clip_grad_norm: float | None = None,
        learning_rate: Callable[[float], float] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        field_specs: Mapping[str, FieldSpec] | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self.chain = _as_chain(model, loss)
        self.device = torch.device(device)
        self._membership: ProcessGroup | None = None
        if not dist.is_initialized():
            self._membership = initialise_process_group(None, _TIMEOUT_SECONDS, device=device)
            self.device = self._membership.device
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        # A group of its own, so that losses and collectives never meet the transport's messages.
        self._control = dist.new_group(backend="gloo") if self.num_ranks > 1 else None
        self.hooks = hooks or Hooks()
        self._seed = seed
        options: dict[str, object] = {"depths": depths} if depths is not None else {}
        if vertical_sync:
            options["vertical_sync"] = True
        self.programs = ProgramBuilder(
            schedule,
            self.num_ranks,
            self.rank,
            2 * self.num_ranks if num_microbatches is None else num_microbatches,
            stages_per_rank=stages_per_rank,
            macrobatch=macrobatch,
            options=options,
        )
        placement = self.programs.sample.placement
        self.partition = resolve_partition(partition, self.chain, placement.num_stages)
        self.held = build_stages(
            self.chain,
            self.partition,
            placement.stages_of(self.rank),
            optimizer,
            seed=seed,
            device=self.device,
            recompute_ratio=_per_stage(recompute_ratio, placement.num_stages),
            recompute=recompute,
            num_microbatches=self.programs.num_microbatches,
        )
        self.transport = Transport(placement, self.rank, self.device, self.hooks.announce)
        self._updater = Updater(
            {index: item.weights for index, item in self.held.items()},
            [name for sizes in parameter_sizes(self.chain) for name in sizes],
            tied_groups(self.chain, self.partition, placement, self.programs.synchronous),
            synchronous=self.programs.synchronous,
            clip_grad_norm=clip_grad_norm,
            learning_rate=learning_rate,
            group=self._control,
        )
        self._executor = Executor(
            self.held,
            placement.rank_of,
            self.transport,
            self._update,
            self.hooks.record,
            seed=seed,
            synchronise=self.device.type == "cuda",
        )
        self._last_rank = placement.rank_of(placement.num_stages - 1)
        self._board = LossBoard(self._last_rank, len(self.chain.loss.parts), self._control)
        self._field_specs = field_specs
        self._specs_of: dict[int, dict[int, tuple[ValueSpec, ...]]] = {}
        self.iteration = 0

    @property
    def fields(self) -> tuple[str, ...]:
        """Name the batch fields that this rank's stages read."""
        return tuple(dict.fromkeys(name for item in self.held.values() for name in item.stage.fields))

    def step(self, *data: Tensor, **fields: Tensor) -> StepResult:
        """Train on one batch, given as tensors in the order of the model's fields or by name; empties the pipeline."""
        return next(iter(list(self.train([fields or data], 1))))

    def train(self, batches: Iterable[Data], num_batches: int | None = None) -> Iterator[StepResult]:
        """Train on batches; yield each one's result when this rank has done its update.

        An asynchronous pipeline fills with the first batch and drains with the last, so it has to know how many there are:
        from `num_batches`, or else from ``len(batches)``.

        Raises:
            NonFiniteLossError: the loss is no number any more; on every rank.
        """
        count = _count(batches, num_batches)
        stream = (as_batch(data, self.chain) for data in islice(iter(batches), count))
        for group in [1] * count if self.programs.synchronous else [count] * (count > 0):
            program = self.programs.training(group, self.iteration)
            yield from self._train(program, self._prepare(stream, program))
            self.iteration += group

    def _train(self, program: Program, batches: Iterable[Batch]) -> Iterator[StepResult]:
        self._program = program
        size = program.num_microbatches
        feed = BatchFeed(batches, size, len(self.held), self._move)
        updates_left = [len(self.held)] * (program.num_serials // size)
        self._board.expect()
        for action in self._executor.run(program, feed):
            batch, position = divmod(action.microbatch, size)
            if position == size - 1:
                updates_left[batch] -= 1
                if not updates_left[batch]:
                    yield self._result(program.first_iteration + batch, batch)
                    if batch + 1 < len(updates_left):
                        self._board.expect()
        self.transport.finish()
        self._board.finish()

    def _result(self, iteration: int, batch: int) -> StepResult:
        size = self.programs.num_microbatches
        names = self.chain.loss.parts
        if self.rank == self._last_rank:
            shares = [self._executor.losses.pop(batch * size + index) for index in range(size)]
            # Where every microbatch is normalised by itself, the batch's loss is their mean.
            scale = self.programs.microbatches_per_update / size
            self._board.publish([math.fsum(share[name].item() for share in shares) * scale for name in names])
        parts = dict(zip(names, self._board.collect(), strict=True))
        loss = math.fsum(parts.values())
        if not math.isfinite(loss):
            shown = ", ".join(f"{name} {value}" for name, value in parts.items())
            raise NonFiniteLossError(
                f"the loss became {loss} at iteration {iteration} ({shown}); lower the learning rate, warm it up for longer, "
                "clip gradients (clip_grad_norm), or look for empty or broken samples"
            )
        return StepResult(iteration, loss, parts, self._updater.gradient_norm)

    def _update(self, stage: int, microbatch: int) -> None:
        program = self._program
        update = program.weights[stage].update_of[microbatch]
        if self.hooks.gradients is not None:
            hook = self.hooks.gradients
            self._updater.observe = lambda index, gradients: hook(index, microbatch, gradients)
        share = program.microbatches_per_update / program.num_microbatches
        self._updater.step(stage, program.first_iteration + update * share)

    def evaluate(self, batches: Iterable[Data]) -> dict[str, float]:
        """Return the loss and its parts over `batches` of any size, with dropout off, on the newest weights."""
        stream = (as_batch(data, self.chain) for data in batches)
        sums = dict.fromkeys(self.chain.loss.parts, 0.0)
        counts = dict.fromkeys(self.chain.loss.parts, 0.0)
        modules = [item.weights.newest for item in self.held.values()]
        for module in modules:
            module.eval()
        for _, same_size in groupby(stream, key=lambda batch: batch.num_samples):
            while together := list(islice(same_size, _EVALUATED_TOGETHER)):
                self._evaluate(together, sums, counts)
        for module in modules:
            module.train()
        totals = torch.tensor([*sums.values(), *counts.values()], dtype=torch.float64)
        if self._control is not None:
            dist.broadcast(totals, self._last_rank, group=self._control)
        values = totals.tolist()
        parts = {name: values[index] / values[index + len(sums)] for index, name in enumerate(sums)}
        return {"loss": math.fsum(parts.values()), **parts}

    def _evaluate(self, batches: list[Batch], sums: dict[str, float], counts: dict[str, float]) -> None:
        program = self.programs.evaluation(len(batches))
        feed = BatchFeed(self._prepare(iter(batches), program), 1, len(self.held), self._move)
        for _ in self._executor.run(program, feed):
            raise AssertionError("an evaluation has no updates")
        self.transport.finish()
        for serial in list(self._executor.losses):
            for name, part in self._executor.losses.pop(serial).items():
                sums[name] += part.item()
            for name, number in self._executor.counts.pop(serial).items():
                counts[name] += number

    def _prepare(self, batches: Iterator[Batch], program: Program) -> Iterator[Batch]:
        """Agree on shapes from the first batch, start the transport, and return all batches."""
        first = next(batches, None)
        if first is None:
            raise DataError("there are no batches to train on or to evaluate")
        num_samples = first.num_samples // program.num_microbatches
        crossing = self._crossing(first, num_samples)
        self.transport.start(program.actions, crossing, program.num_serials, program.window)
        return concatenate([first], batches)

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _crossing(self, first: Batch, num_samples: int) -> dict[int, tuple[ValueSpec, ...]]:
        """Infer what crosses each cut for microbatches of `num_samples`, once, and agree with the other ranks on the plan."""
        if num_samples not in self._specs_of:
            fields = field_tensors(self.chain, first, self._field_specs, num_samples)
            crossing = crossing_specs(self.chain, self.partition, fields)
            for index, item in self.held.items():
                specs = crossing.get(index, ())
                item.stage.differentiable = frozenset(spec.name for spec in specs if spec.requires_grad)
            facts = {
                "schedule": f"{self.programs.sample.name} {self.programs.sample.fingerprint()}",
                "partition": self.partition,
                "values between stages": crossing,
                "seed": self._seed,
            }
            agree(facts, self._control)
            self._specs_of[num_samples] = crossing
        return self._specs_of[num_samples]

    def close(self) -> None:
        """Leave the process group, if this pipeline made it."""
        if self._membership is not None:
            membership, self._membership = self._membership, None
            destroy_process_group(membership)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()


def _as_chain(model: Chain | nn.Sequential | Sequence[nn.Module | Block], loss: Callable[..., Tensor] | None) -> Chain:
    if isinstance(model, Chain):
        if loss is not None:
            raise ConfigError("a Chain brings its own loss; leave the loss argument out")
        return model
    if loss is None:
        raise ConfigError("modules need a loss: a function of the last module's output and the target, e.g. mse_loss")
    return Chain.from_modules(model, CallableLoss(loss))


def _per_stage(ratio: float | Sequence[float], num_stages: int) -> list[float]:
    ratios = list(ratio) if isinstance(ratio, Sequence) else [float(ratio)] * num_stages
    if len(ratios) != num_stages:
        raise ConfigError(
            f"recompute_ratio has {len(ratios)} values but there are {num_stages} stages; give one for each"
        )
    return ratios


def _count(batches: Iterable[Data], num_batches: int | None) -> int:
    if num_batches is not None:
        return num_batches
    if isinstance(batches, Sized):
        return len(batches)
    raise ConfigError("an iterator does not say how many batches it has; pass num_batches")
