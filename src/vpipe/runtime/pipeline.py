"""The library's front door: ties model, loss, optimizer and schedule together, and owns nothing but their order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from operator import methodcaller
from typing import cast

from torch import Tensor

from vpipe.errors import DataError, ExecutionError, NonFiniteLossError
from vpipe.model.chain import Chain
from vpipe.model.loss import LearnedLoss, Loss
from vpipe.model.modes import evaluating
from vpipe.model.modules import Modules
from vpipe.plan.plan import Plan
from vpipe.runtime.arguments import (
    MEMORY,
    UPDATE,
    GivenParameters,
    Memory,
    Untaken,
    as_chain,
    as_plan,
    check_kinds,
    check_optimizer,
    count_batches,
    refusing_moved,
)
from vpipe.runtime.assembly import build_stages, connect, named_state, show_loss, tied_groups
from vpipe.runtime.batch import Batch, BatchLike, as_batch
from vpipe.runtime.comm.agreement import agree, agree_on_weights
from vpipe.runtime.comm.board import LossBoard
from vpipe.runtime.comm.transport import Transport
from vpipe.runtime.comm.world import World
from vpipe.runtime.crossings import Crossings
from vpipe.runtime.evaluation import LossSums, Piece, pieces_alike
from vpipe.runtime.executor import Executor, Program
from vpipe.runtime.feed import BatchFeed
from vpipe.runtime.hooks import Hooks
from vpipe.runtime.memory.allocator import keep_freed_memory
from vpipe.runtime.memory.host_link import HostLink
from vpipe.runtime.memory.ledger import Ledger
from vpipe.runtime.memory_watch import MemoryWatch
from vpipe.runtime.programs import ProgramBuilder
from vpipe.runtime.result import Outcomes, StepResult
from vpipe.runtime.weights.stage_optimizer import OptimizerFactory
from vpipe.runtime.weights.update import Update, Updater
from vpipe.schedule.action import Action, Kind

__all__ = ["Hooks", "Pipeline", "StepResult"]


class Pipeline:
    """Trains a chain of blocks that is spread over the ranks of a `World`.

    Every rank makes the same `Pipeline` and gives it the same batches; each builds and trains only its own stages.
    Under torchrun it joins the other ranks by itself, and leaves them at the end of a `with` block or by `close`;
    without torchrun there is one rank.

    Args:
        model: a `Chain`, or modules that each take the previous one's tensor; these keep the weights that they have.
        loss: for modules alone: a function of the last one's output and the batch's target, the mean over samples, or a
            `vpipe.Loss`. A module's own weights are trained, too; it shows them on the rank of the last stage.
        plan: a `vpipe.Plan`, of which ranks and cuts may be open, or the name of a schedule.
        optimizer: makes the optimizer of one stage, or a list of several, from its (name, parameter) pairs, which
            torch's optimizers take.
        update: what an update does beside the optimizer, a `vpipe.Update`.
        memory: what a rank may hold, a `vpipe.Memory`.
        world: the ranks that this one works with, a `vpipe.World`; None joins them, and leaves them at the end.
        seed: for dropout, and for initial weights that the blocks draw when they are built.
        hooks: what the caller wants to watch.

    Raises:
        ConfigError, PlanError, ScheduleError, ModelError: what was given does not fit together, or ranks disagree.
    """

    @refusing_moved
    def __init__(
        self,
        model: Chain | Modules,
        loss: Loss | Callable[..., Tensor] | None = None,
        *,
        plan: Plan | str = "1f1b",
        optimizer: OptimizerFactory,
        update: Update = UPDATE,
        memory: Memory = MEMORY,
        world: World | None = None,
        seed: int = 0,
        hooks: Hooks | None = None,
    ) -> None:
        self.chain = as_chain(model, loss)
        ending = self.chain.loss
        self._own_loss = ending.module if isinstance(ending, LearnedLoss) and model is not self.chain else None
        open_plan = as_plan(plan)
        check_optimizer(optimizer)
        self.hooks = Hooks() if hooks is None else hooks
        check_kinds(update=(update, Update), memory=(memory, Memory), seed=(seed, int), hooks=(self.hooks, Hooks))
        if world is not None:
            check_kinds(world=(world, World))
        self._is_busy, self._is_closed, self.iteration = False, False, 0
        self._untaken = Untaken()
        self._ended_by: BaseException | None = None
        self.host_link: HostLink | None = None
        self._owns_world = world is None
        self.world = World.join() if world is None else world
        self.device, self.rank, self.num_ranks = self.world.device, self.world.rank, self.world.num_ranks
        keep_freed_memory()
        with ExitStack() as leaving:
            leaving.push(self)  # what fails here fails inside of the group that was joined
            self.plan = open_plan.resolve(self.chain, self.world)
            self.programs = ProgramBuilder(self.plan, self.rank)
            agree(self._facts() | update.facts() | {"seed": seed}, self.world)
            given = self.chain.given_weights()
            agree_on_weights(given, self.world)
            self._given = GivenParameters(given)
            self._crossings = Crossings(self.chain, self.plan.cut, self.world)
            placement = self.programs.sample.placement
            self.held = build_stages(
                self.chain,
                self.plan,
                placement.stages_of(self.rank),
                optimizer,
                seed=seed,
                device=self.device,
                swapping=self.programs.swapping,
                moving=self.programs.moving,
            )
            self.transport = Transport(self.programs.sample, self.world, self.hooks.announce)
            self._watch_memory(memory)
            self._assemble(update, seed)
            leaving.pop_all()

    def _facts(self) -> dict[str, object]:
        """Return what ranks must agree on about the model and the plan."""
        return self.plan.facts() | {
            "blocks": " ".join(block.name for block in self.chain.blocks),
            "batch fields": self.chain.fields,
            "whole fields": self.chain.whole_fields,
            "parts of the loss": self.chain.loss.parts,
            "tied weights": self.chain.tied,
        }

    def _watch_memory(self, memory: Memory) -> None:
        """Open the account of what the rank holds, and the way to host memory."""
        self.ledger = Ledger(self.rank, memory.limit_of(self.rank, self.num_ranks))
        stages = {index: (item.stage, item.weights) for index, item in self.held.items()}
        steady = self.plan.num_batches_until_steady
        self._watch = MemoryWatch(
            self.ledger, stages, self.transport, self.world, steady, for_ever=memory.watch == "all"
        )
        self.host_link = connect(
            self.held, self.programs.swapping, self.device, memory.swap_directory, self._watch.moved
        )

    def _assemble(self, update: Update, seed: int) -> None:
        """Make what moves values, steps and tells the loss, around the stages; collective."""
        placement, synchronous = self.programs.sample.placement, self.programs.synchronous
        self._last_rank = self.programs.sample.rank_of(Action(placement.num_stages - 1, Kind.F, 0))
        parts = self.chain.loss.parts
        self._board = LossBoard(self._last_rank, len(parts), self.world, shared_memory=self.world.shared_memory)
        self._outcomes = Outcomes(self._board, parts, synchronous=synchronous, stops=update.on_non_finite == "stop")
        sizes = self.chain.parameter_sizes()
        self._updater = Updater(
            {index: item.weights for index, item in self.held.items()},
            [name for named in sizes for name in named],
            tied_groups(self.chain, self.plan.cut, placement, sizes, synchronous=synchronous, world=self.world),
            update,
            synchronous=synchronous,
            loss_of_batch=self._outcomes.loss_of_batch,
            world=self.world,
            hooks=self.hooks,
        )
        self._executor = Executor(
            self.held,
            self.programs.sample.rank_of,
            self.transport,
            self._update,
            self._publish,
            self.hooks.record,
            seed=seed,
            link=self.host_link,
            watch=self._watch,
            synchronise=self.device.type == "cuda",
        )

    @property
    def fields(self) -> tuple[str, ...]:
        """Name the batch fields that this rank's stages read."""
        return tuple(dict.fromkeys(name for item in self.held.values() for name in item.stage.fields))

    def step(self, *data: BatchLike, **fields: Tensor) -> StepResult:
        """Train on one batch, given as tensors in the order of the model's fields, by name, or as one object.

        Raises:
            DataError, ConfigError: the batch is not one of the model's, or ranks were given different ones.
            NonFiniteLossError: the loss or the gradient norm is not finite, and was not applied; on every rank.
        """
        if data and fields:
            raise DataError(
                f"{len(data)} tensors were given in order and {', '.join(fields)} by name; give all in one way"
            )
        (result,) = self.train([fields or (data[0] if len(data) == 1 else cast(Sequence[Tensor], data))], 1)
        return result

    def train(self, batches: Iterable[BatchLike], num_batches: int | None = None) -> Iterator[StepResult]:
        """Train on batches; yield each one's result when this rank has done its update.

        An asynchronous pipeline fills with the first batch and drains with the last: it has to know how many there are,
        from `num_batches` or else from ``len(batches)``, and all of its results must be taken.

        Raises:
            DataError, ConfigError: a batch is not one of the model's, or ranks were given different ones.
            NonFiniteLossError: the loss or a gradient is not finite, and was not applied; on every rank, but for a
                gradient in an asynchronous schedule.
        """
        self._check_open()
        count = count_batches(batches, num_batches, synchronous=self.programs.synchronous)
        stream = (as_batch(data, self.chain) for data in itertools.islice(iter(batches), count))
        run = self._train_each(stream, count) if self.programs.synchronous else self._train_all(stream, count or 0)
        return self._untaken.watch(run)

    def _train_each(self, batches: Iterator[Batch], count: int | None) -> Iterator[StepResult]:
        done = 0
        for batch in batches:
            with nullcontext() if self.iteration else self._given.staying_out():
                (result,) = self._run(self.programs.training(1, self.iteration), iter([batch]))
            done += 1
            yield result
        if count is not None and done < count:
            raise DataError(f"batch {done} was expected but the data ended; give a num_batches that exists")

    def _train_all(self, batches: Iterator[Batch], count: int) -> Iterator[StepResult]:
        agree({"number of batches": count}, self.world)
        if count:
            yield from self._run(self.programs.training(count, self.iteration), batches)

    def _run(self, program: Program, batches: Iterator[Batch]) -> Iterator[StepResult]:
        """Execute a training program to its end."""
        self._program = program
        feed = self._start(program, batches)
        updates_left = [len(self.held)] * program.num_batches
        self._is_busy = True
        self._board.expect()
        done = 0
        try:
            for action in self._executor.run(program, feed):
                batch, position = divmod(action.microbatch, program.num_microbatches)
                if position == program.num_microbatches - 1:
                    updates_left[batch] -= 1
                    if not updates_left[batch]:
                        result, error = self._result(program, batch)
                        done = batch + 1
                        if batch + 1 < program.num_batches:
                            if error is not None:
                                # Every rank comes here by itself; it must not be disturbed by others that have left.
                                self.transport.finish_gradients()
                                self._board.finish()
                                raise error
                            self._board.expect()
                            with self._executor.callers_turn():
                                yield result
            self.transport.finish()
            self._board.finish()
        except GeneratorExit:
            raise
        except BaseException as problem:
            self.iteration += done
            self._give_up(problem)
            raise
        last = self.held.get(self.plan.cut.num_stages - 1)
        if self._own_loss is not None and last is not None:
            show_loss(self._own_loss, last)
        self.iteration += program.num_batches
        self._is_busy = False
        if error is not None:
            raise error
        yield result

    def _give_up(self, problem: BaseException) -> None:
        """Note what ended a program before its end; where no other rank is in the middle of it, get ready for more."""
        if self.num_ranks > 1 or self.host_link is not None:
            self._ended_by = problem
            return
        self._executor.forget()
        self._updater.forget()
        self._board.forget()
        self._watch.forget()
        self._is_busy = False

    def _publish(self, batch: int) -> None:
        size, losses = self._program.num_microbatches, self._executor.losses
        shares = [losses.pop(serial) for serial in range(batch * size, (batch + 1) * size) if serial in losses]
        # Where a batch is several updates, each normalised by itself, the batch's loss is their mean.
        self._outcomes.publish(shares, 1 / -(-len(shares) // self._program.update_size))

    def _result(self, program: Program, batch: int) -> tuple[StepResult, NonFiniteLossError | None]:
        """Return what a batch gave, and why training ends with it if it does."""
        size = program.num_microbatches
        reasons = self._updater.take_refused(range(batch * size, (batch + 1) * size))
        return self._outcomes.result(program.first_iteration + batch, self._updater.gradient_norm, reasons)

    def _update(self, stage: int, microbatch: int) -> None:
        program = self._program
        share = program.update_size / program.num_microbatches
        progress = program.first_iteration + program.weights[stage].update_of[microbatch] * share
        self._updater.step(stage, microbatch, progress)

    def evaluate(self, batches: Iterable[BatchLike], microbatch_size: int | None = None) -> dict[str, float]:
        """Return the loss and its parts over `batches` of any size, with dropout off, on the newest weights.

        Each batch is cut from its start into microbatches of `microbatch_size` samples and a short last one; None: into
        `num_microbatches`, as for training. The result depends on weights, batches and size, not on what came before.

        Raises:
            DataError, MemoryLimitError: a batch is not one of the model's; a rank held more than its limit.
        """
        self._check_open()
        sums = LossSums(self.chain.loss.parts)
        stream = (as_batch(data, self.chain) for data in batches)
        with evaluating([item.weights.newest for item in self.held.values()]):
            for alike in pieces_alike(stream, microbatch_size, self.programs, self.ledger.limit):
                self._evaluate(alike, sums)
        return sums.means(self._last_rank, self.world)

    def _evaluate(self, pieces: list[Piece], sums: LossSums) -> None:
        program = self.programs.evaluation([piece.number for piece in pieces])
        agree({"microbatches to evaluate": len(pieces)}, self.world)  # whoever is ahead waits here
        feed = self._start(program, (piece.batch for piece in pieces))
        try:
            for _ in self._executor.run(program, feed):
                raise AssertionError("an evaluation has no updates")
            self.transport.finish()
        except BaseException as problem:
            self._give_up(problem)
            raise
        sums.take(self._executor.losses, self._executor.counts)

    def _check_open(self) -> None:
        self._untaken.check()
        if self._is_closed or not self.world.is_open:
            raise ExecutionError(
                "the pipeline was closed, so its ranks cannot be reached any more; make another one, or train inside "
                "of the `with` block"
            )

    def _start(self, program: Program, batches: Iterator[Batch]) -> BatchFeed:
        """Look at the first batch, agree on shapes, and start the transport."""
        self._given.check()
        if self._ended_by is not None:
            raise ExecutionError(
                f"an earlier batch ended in the middle with {type(self._ended_by).__name__}: {self._ended_by}; other "
                "ranks may be waiting for it still, so make another pipeline"
            )
        if self._is_busy:
            raise ExecutionError(
                "an earlier train() did not get to its last batch, so microbatches are still in flight; take all of "
                "its results, or give it the num_batches that you want"
            )
        if (first := next(batches, None)) is None:
            raise DataError("there are no batches")
        count, training = program.num_microbatches, program.training
        self._crossings.agree(first, count, training=training, compare=program.compares_batches)
        readers = [item.stage.fields for item in self.held.values()]
        every, move = itertools.chain([first], batches), methodcaller("to", self.device, non_blocking=True)
        crossing = partial(self._crossings.of, training=training, together=False)
        feed = BatchFeed(every, count, readers, move, crossing, self._executor.callers_turn, program.lead)
        self.transport.start(program.actions, feed, program.num_serials, program.window)
        return feed

    def state_dict(self) -> dict[str, Tensor]:
        """Return the newest weights and the buffers of this rank's blocks, by their names in the whole model.

        The dictionaries of all ranks together are the model's; for an `nn.Sequential`, what its own would be. Tensors
        are copies: later training does not change them.
        """
        return {name: tensor.detach().clone() for name, tensor in named_state(self.chain, self.held.values()).items()}

    def close(self) -> None:
        """Leave the process group, if this pipeline joined it."""
        self._is_closed = True
        if self.host_link is not None:
            self.host_link.close()
        if self._owns_world:
            self.world.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None or self.num_ranks == 1:
            self.close()
            if error is None:
                self._untaken.check()
        elif self._owns_world:
            self.world.__exit__(kind, error, traceback)  # the others learn why; leaving together is impossible now
