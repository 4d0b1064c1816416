"""The library's front door: ties model, loss, optimizer and schedule together, and owns nothing but their order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from operator import methodcaller
from typing import Any

from torch import Tensor

from vpipe.errors import DataError, NonFiniteLossError
from vpipe.model.chain import Chain
from vpipe.model.loss import LearnedLoss, Loss, Metric
from vpipe.model.modes import evaluating
from vpipe.model.modules import Modules, leaving_out_losses
from vpipe.plan.plan import Plan
from vpipe.runtime.arguments import (
    MEMORY,
    UPDATE,
    GivenParameters,
    Memory,
    Readiness,
    as_chain,
    as_plan,
    check_kinds,
    check_optimizer,
    choose_batch,
    count_batches,
    refusing_moved,
    watch_memory,
)
from vpipe.runtime.assembly import build_stages, connect, facts_of, show_loss, stages_of, tied_groups
from vpipe.runtime.batch import Batch, BatchLike, as_batch, as_input
from vpipe.runtime.comm.agreement import agree, agree_on_weights
from vpipe.runtime.comm.board import LossBoard
from vpipe.runtime.comm.transport import Transport
from vpipe.runtime.comm.waits.activity import CLOSED, ended_by
from vpipe.runtime.comm.world import World
from vpipe.runtime.crossings import Crossings
from vpipe.runtime.evaluation import Engine, LossSums, Piece, Predictions, join, pieces_alike, share_with_all
from vpipe.runtime.executor import Executor, HeldStage
from vpipe.runtime.feed import BatchFeed
from vpipe.runtime.hooks import Hooks
from vpipe.runtime.memory.allocator import keep_freed_memory
from vpipe.runtime.memory.host_link import HostLink
from vpipe.runtime.programs import Program, ProgramBuilder
from vpipe.runtime.result import Outcomes, Outputs, StepResult
from vpipe.runtime.weights.model_state import ModelState
from vpipe.runtime.weights.stage_optimizer import OptimizerFactory
from vpipe.runtime.weights.update import Update, Updater
from vpipe.schedule.action import Action, Kind

__all__ = ["Hooks", "Pipeline", "StepResult"]

_NO_MORE = {"microbatches to evaluate": "no more"}


class Pipeline(ModelState):
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
        metrics: what is told and not trained on, by name: functions of what the loss is given, which return the mean
            over samples or a pair (sum, count), or `vpipe.Metric`s.
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
        metrics: Mapping[str, Metric | Callable[..., Any]] | None = None,
        memory: Memory = MEMORY,
        world: World | None = None,
        seed: int = 0,
        hooks: Hooks | None = None,
    ) -> None:
        self.chain = as_chain(model, loss, metrics)
        made = None if isinstance(model, Chain) else self.chain.loss
        self._own_loss = made.module if isinstance(made, LearnedLoss) else None
        open_plan = as_plan(plan)
        check_optimizer(optimizer)
        self.hooks = Hooks() if hooks is None else hooks
        check_kinds(update=(update, Update), memory=(memory, Memory), seed=(seed, int), hooks=(self.hooks, Hooks))
        check_kinds(**({} if world is None else {"world": (world, World)}))
        self._ready, self._seed, self.iteration = Readiness(), seed, 0
        self._predictor: Engine | None = None
        self.host_link: HostLink | None = None
        self._owns_world, self.world = world is None, World.join() if world is None else world
        self.device, self.rank, self.num_ranks = self.world.device, self.world.rank, self.world.num_ranks
        self._calls = self.world.activity.calls()
        keep_freed_memory()
        with self._calls.during("Pipeline"), ExitStack() as leaving:
            leaving.push(self)  # what fails here fails inside of the group that was joined
            self.plan = open_plan.resolve(self.chain, self.world)
            self.programs = ProgramBuilder(self.plan, self.rank)
            agree(self.plan.facts() | facts_of(self.chain) | update.facts() | {"seed": seed}, self.world)
            given = self.chain.given_weights()
            agree_on_weights(given, self.world)
            self._given = GivenParameters(given)
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
            self._watch = watch_memory(memory, self.plan, self.held, self.transport, self.world)
            self.ledger, moved = self._watch.ledger, self._watch.moved
            self.host_link = connect(self.held, self.programs.swapping, self.device, memory.swap_directory, moved)
            self._assemble(update)
            leaving.pop_all()

    def _assemble(self, update: Update) -> None:
        """Make what moves values, steps and tells the loss, around the stages; collective."""
        synchronous, world = self.programs.synchronous, self.world
        self._last_rank = self.programs.sample.rank_of(Action(self.plan.cut.num_stages - 1, Kind.F, 0))
        parts, metrics, shared = self.chain.loss.parts, self.chain.metric_names, world.shared_memory
        self._board = LossBoard(self._last_rank, len(parts) + len(metrics), world, shared_memory=shared)
        self._outcomes = Outcomes(self._board, parts, metrics, update, synchronous=synchronous)
        sizes, placement = self.chain.parameter_sizes(), self.programs.sample.placement
        tied = tied_groups(self.chain, self.plan.cut, placement, sizes, synchronous=synchronous, world=world)
        weights = {index: item.weights for index, item in self.held.items()}
        told, names = self._outcomes.loss_of_batch, [name for named in sizes for name in named]
        self._updater = Updater(
            weights, names, tied, update, synchronous=synchronous, loss_of_batch=told, world=world, hooks=self.hooks
        )
        self._engine = self._make_engine(self.chain, self.held)
        self._executor = self._engine.executor
        self._parts, self._inference, self._check_idle = (
            self.held.values(),
            self._engine.crossings,
            self._ready.check_idle,
        )

    def _make_engine(self, chain: Chain, held: dict[int, HeldStage]) -> Engine:
        executor = Executor(
            held,
            self.programs.sample.rank_of,
            self.transport,
            self._update,
            self._publish,
            self.hooks.record,
            seed=self._seed,
            link=self.host_link,
            watch=self._watch,
            synchronise=self.device.type == "cuda",
        )
        return Engine(held, Crossings(chain, self.plan.cut, self.world), executor)

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
        with self._calls.during("step"):
            (result,) = self.train([choose_batch(data, fields)], 1)
        return result

    def train(
        self, batches: Iterable[BatchLike], num_batches: int | None = None, *, outputs: bool = False
    ) -> Iterator[StepResult]:
        """Train on batches; yield each one's result when this rank has done its update.

        An asynchronous pipeline fills with the first batch and drains with the last: it has to know how many there are,
        from `num_batches` or else from ``len(batches)``, and all of its results must be taken. With `outputs` those of
        the rank of the last stage have what the last block returned, which is kept until then.

        Raises:
            DataError, ConfigError: a batch is not one of the model's, or ranks were given different ones.
            NonFiniteLossError: the loss or a gradient is not finite, and was not applied; on every rank, but for a
                gradient in an asynchronous schedule.
        """
        self._ready.check_open(is_world_open=self.world.is_open)
        count = count_batches(batches, num_batches, synchronous=self.programs.synchronous)
        stream = (as_batch(data, self.chain) for data in itertools.islice(self._calls.reading(iter(batches)), count))
        train = self._train_each if self.programs.synchronous else self._train_all
        run = self._calls.following(train(stream, count, outputs), lambda: self.iteration, count or batches)
        return self._ready.untaken.watch(run)

    def _train_each(self, batches: Iterator[Batch], count: int | None, outputs: bool) -> Iterator[StepResult]:
        done = 0
        for batch in batches:
            with nullcontext() if self.iteration else self._given.staying_out():
                (result,) = self._run(self.programs.training(1, self.iteration, keeps_outputs=outputs), iter([batch]))
            done += 1
            yield result
        if count is not None and done < count:
            raise DataError(f"batch {done} was expected but the data ended; give a num_batches that exists")

    def _train_all(self, batches: Iterator[Batch], count: int | None, outputs: bool) -> Iterator[StepResult]:
        agree({"number of batches": count}, self.world)
        if count:
            yield from self._run(self.programs.training(count, self.iteration, keeps_outputs=outputs), batches)

    def _run(self, program: Program, batches: Iterator[Batch]) -> Iterator[StepResult]:
        """Execute a training program to its end."""
        self._program = program
        feed = self._start(program, batches, self._engine)
        updates_left = [len(self.held)] * program.num_batches
        self._ready.begin()
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
        except BaseException as problem:
            if not isinstance(problem, GeneratorExit):
                self.iteration += done
                self._give_up(problem)
            raise
        show_loss(self._own_loss, self.held.get(self.plan.cut.num_stages - 1))
        self.iteration += program.num_batches
        self._ready.end()
        if error is not None:
            raise error
        yield result

    def _give_up(self, problem: BaseException) -> None:
        """Note what ended a program before its end; where no other rank is in the middle of it, get ready for more."""
        if self.num_ranks > 1 or self.host_link is not None:
            self._ready.fail(problem)
            self._calls.end(ended_by(problem))
            return
        for engine in filter(None, (self._engine, self._predictor)):
            engine.executor.forget()
        self._updater.forget()
        self._board.forget()
        self._watch.forget()
        self._ready.end()

    def _publish(self, batch: int) -> None:
        losses = self._executor.losses
        shares = [losses.pop(serial) for serial in self._program.serials_of(batch) if serial in losses]
        # Where a batch is several updates, each normalised by itself, the batch's loss is their mean.
        self._outcomes.publish(shares, 1 / -(-len(shares) // self._program.update_size))

    def _result(self, program: Program, batch: int) -> tuple[StepResult, NonFiniteLossError | None]:
        """Return what a batch gave, and why training ends with it if it does."""
        serials = program.serials_of(batch)
        reasons, outputs = self._updater.take_refused(serials), join(self._executor.take_outputs(serials))
        return self._outcomes.result(program.first_iteration + batch, self._updater.gradient_norm, reasons, outputs)

    def _update(self, stage: int, microbatch: int) -> None:
        self._updater.step(stage, microbatch, self._program.progress_of(stage, microbatch))

    def evaluate(self, batches: Iterable[BatchLike], microbatch_size: int | None = None) -> dict[str, float]:
        """Return the loss, its parts and the metrics over `batches` of any size: no dropout, the newest weights.

        Each batch is cut from its start into microbatches of `microbatch_size` samples and a short last one; None: into
        `num_microbatches`, as for training. The result depends on weights, batches and size, not on what came before.

        Raises:
            DataError, MemoryLimitError: a batch is not one of the model's; a rank held more than its limit.
        """
        self._ready.check_open(is_world_open=self.world.is_open)
        sums = LossSums(self.chain.loss.parts, self.chain.metric_names)
        stream = (as_batch(data, self.chain) for data in self._calls.reading(iter(batches)))
        modules = [item.weights.newest for item in self.held.values()]
        with self._calls.during("evaluate"), evaluating(modules, calling=True):
            for alike in pieces_alike(stream, microbatch_size, self.programs, self.ledger.limit):
                self._forwards(self._engine, alike)
                sums.take(self._executor.losses, self._executor.counts)
            agree(_NO_MORE, self.world)
            return sums.means(self._last_rank, self.world)

    def predict(
        self, batches: Iterable[BatchLike], microbatch_size: int | None = None, *, everywhere: bool = False
    ) -> Iterator[Outputs | None]:
        """Yield what the last block returns for each of `batches`, in their order: no dropout, the newest weights.

        It is one tensor, or several by name, on the rank of the last stage, and None elsewhere; with `everywhere` all
        ranks get it. Fields that only loss and metrics read may be missing. Batches are cut as by `evaluate`; some are
        read ahead, so train when all is taken.

        Raises:
            DataError, MemoryLimitError: as `evaluate` does.
            ModelError: what comes out of microbatches cannot be put together to a batch.
        """
        self._ready.check_open(is_world_open=self.world.is_open)
        return self._ready.untaken.watch(self._predict(batches, microbatch_size, everywhere), "predict")

    def _predict(self, batches: Iterable[BatchLike], size: int | None, everywhere: bool) -> Iterator[Outputs | None]:
        chain = self.chain.without_loss()
        engine = self._predictor = self._predictor or self._make_engine(chain, stages_of(chain, self.held))
        predictions = Predictions(as_input(data, self.chain, chain) for data in self._calls.reading(iter(batches)))
        for alike in predictions.pieces(size, self.programs, self.ledger.limit):
            modules = [item.weights.newest for item in self.held.values()]
            silent = leaving_out_losses(itertools.chain(*modules))
            with self._calls.during("predict"), evaluating(modules, calling=True), silent:
                self._forwards(engine, alike, keeps_outputs=True)
            for outputs in predictions.take(alike, engine.executor.outputs):
                with self._calls.during("predict"):
                    found = share_with_all(outputs, self._last_rank, self.world) if everywhere else outputs
                yield found
        with self._calls.during("predict"):
            agree(_NO_MORE, self.world)

    def _forwards(self, engine: Engine, pieces: list[Piece], *, keeps_outputs: bool = False) -> None:
        program = self.programs.evaluation([piece.number for piece in pieces], keeps_outputs=keeps_outputs)
        agree({"microbatches to evaluate": f"{len(pieces)} more"}, self.world)  # whoever is ahead waits here
        feed = self._start(program, (piece.batch for piece in pieces), engine)
        try:
            for _ in engine.executor.run(program, feed):
                raise AssertionError("an evaluation has no updates")
            self.transport.finish()
        except BaseException as problem:
            self._give_up(problem)
            raise

    def _start(self, program: Program, batches: Iterator[Batch], engine: Engine) -> BatchFeed:
        """Look at the first batch, agree on shapes, and start the transport."""
        self._given.check()
        self._ready.check_idle()
        if (first := next(batches, None)) is None:
            raise DataError("there are no batches")
        count, training = program.num_microbatches, program.training
        held, crossings, executor = engine
        readers = [item.stage.fields for item in held.values()]
        crossings.agree(first, count, training=training, compare=program.compares_batches)
        every, move = itertools.chain([first], batches), methodcaller("to", self.device, non_blocking=True)
        of = partial(crossings.of, training=training, together=False)
        feed = BatchFeed(every, count, readers, move, of, executor.callers_turn, program.lead)
        self.transport.start(program.actions, feed, program.num_serials, program.window)
        self._calls.begin("training" if training else "evaluation")
        return feed

    def close(self) -> None:
        """Leave the process group, if this pipeline joined it."""
        self._ready.close()
        self._calls.end(CLOSED)
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
                self._ready.untaken.check()
        elif self._owns_world:
            self.world.__exit__(kind, error, traceback)  # the others learn why; leaving together is impossible now
