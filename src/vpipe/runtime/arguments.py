"""What the library's user may write, turned into what the runtime works with; mistakes are told in the user's words."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from numbers import Integral
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast, get_args

from torch import Tensor, nn

from vpipe.errors import ConfigError, DataError, ExecutionError
from vpipe.model.chain import Chain
from vpipe.model.loss import Loss, Metric, as_loss
from vpipe.model.modules import Modules
from vpipe.plan.plan import Plan
from vpipe.runtime.batch import BatchLike
from vpipe.runtime.comm.transport import Transport
from vpipe.runtime.comm.world import World
from vpipe.runtime.executor import HeldStage
from vpipe.runtime.memory.ledger import Ledger
from vpipe.runtime.memory_watch import MemoryWatch, WatchMode
from vpipe.runtime.weights.update import Update
from vpipe.words.near import did_you_mean

__all__ = [
    "MEMORY",
    "UPDATE",
    "GivenParameters",
    "Memory",
    "Readiness",
    "Untaken",
    "as_chain",
    "as_plan",
    "check_kinds",
    "check_optimizer",
    "choose_batch",
    "count_batches",
    "refusing_moved",
    "watch_memory",
]

P = ParamSpec("P")
T = TypeVar("T")


def as_chain(
    model: Chain | Modules,
    loss: Loss | Callable[..., Tensor] | None,
    metrics: Mapping[str, Metric | Callable[..., Any]] | None = None,
) -> Chain:
    """Return `model` as a chain that ends in `loss`, with `metrics` besides those that it has.

    Raises:
        ConfigError: a chain with a loss beside it, or modules without one.
        ModelError: `model` is neither a chain nor modules in a row, or two metrics have one name.
    """
    if not isinstance(model, Chain):
        return Chain.from_modules(model, as_loss(loss), metrics=metrics)
    if loss is not None:
        raise ConfigError("a Chain brings its own loss; leave the loss argument out")
    if not metrics:
        return model
    if twice := sorted(model.metrics.keys() & metrics.keys()):
        raise ConfigError(f"the Chain has a metric '{twice[0]}' already; rename the one that is given beside it")
    return replace(model, metrics={**model.metrics, **metrics})


def check_optimizer(optimizer: object) -> None:
    """Raise ConfigError for what makes no optimizer."""
    if not callable(optimizer):
        raise ConfigError(
            f"optimizer is of type {type(optimizer).__name__}; give a function that makes one of a stage's parameters, "
            "e.g. lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )


@dataclass(frozen=True)
class Memory:
    """What a rank may hold, and where the rest goes.

    Args:
        limit: bytes that a rank may hold by its `ledger`, one number or one per rank; more is an error.
        watch: which batches the `ledger` looks at: the `first` ones, or `all` (slower; so does a limit).
        swap_directory: where what is swapped goes on a CPU, a fast disk; None: where temporary files are.
    """

    limit: int | Sequence[int] | None = None
    watch: WatchMode = "first"
    swap_directory: Path | None = None

    def __post_init__(self) -> None:
        limits = self.limit if isinstance(self.limit, list | tuple) else [self.limit]
        for limit in limits:
            if limit is not None and (not isinstance(limit, Integral) or isinstance(limit, bool)):
                raise ConfigError(f"the memory limit is {limit!r}; give a number of bytes, such as 4 * 2**30")
        if self.watch not in get_args(WatchMode):
            raise ConfigError(f"watch is {self.watch!r}; choose one of {', '.join(get_args(WatchMode))}")
        if self.swap_directory is not None and not isinstance(self.swap_directory, str | Path):
            raise ConfigError(f"swap_directory is {self.swap_directory!r}; give a path")

    def limit_of(self, rank: int, num_ranks: int) -> int | None:
        """Return the bytes that `rank` may hold.

        Raises:
            ConfigError: another number of limits than ranks, or one that is no size.
        """
        limits = list(self.limit) if isinstance(self.limit, Sequence) else [self.limit]
        if len(limits) == 1:
            limits *= num_ranks
        if len(limits) != num_ranks:
            raise ConfigError(
                f"the memory limit has {len(limits)} entries for {num_ranks} ranks; give one, or one each"
            )
        if any(item is not None and item < 1 for item in limits):
            raise ConfigError(f"the memory limit is {self.limit}; give bytes above 0, or None for no limit")
        return limits[rank]


def watch_memory(
    memory: Memory, plan: Plan, held: Mapping[int, HeldStage], transport: Transport, world: World
) -> MemoryWatch:
    """Open the account of what a rank holds, and return who keeps it."""
    ledger = Ledger(world.rank, memory.limit_of(world.rank, world.num_ranks))
    stages = {index: (item.stage, item.weights) for index, item in held.items()}
    steady, for_ever = plan.num_batches_until_steady, memory.watch == "all"
    return MemoryWatch(ledger, stages, transport, world, steady, for_ever=for_ever)


def check_kinds(**given: tuple[object, type]) -> None:
    """Raise ConfigError for arguments that are of another kind than they have to be."""
    for name, (value, kind) in given.items():
        if not isinstance(value, Integral if kind is int else kind) or isinstance(value, bool):
            wanted = "a whole number" if kind is int else f"a vpipe.{kind.__name__}"
            raise ConfigError(f"{name} is {value!r}; give {wanted}")


UPDATE, MEMORY = Update(), Memory()
"""What holds where nothing is said."""


_TRAIN_FIRST = (
    "make it with the weight trained, and call pipeline.freeze('{name}') and later pipeline.unfreeze('{name}')"
)


class GivenParameters:
    """The caller's own parameters, of which a pipeline trains copies: what is said on them later has no effect."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._trained = [
            (name, weakref.ref(item), item.requires_grad)
            for name, item in weights.items()
            if isinstance(item, nn.Parameter)
        ]

    def check(self) -> None:
        """Raise ConfigError where one was frozen or unfrozen since."""
        for name, reference, was_trained in self._trained:
            item = reference()
            if item is not None and item.requires_grad != was_trained:
                raise ConfigError(
                    f"'{name}' of the modules that were given is {'frozen' if was_trained else 'trained'} now, and was "
                    f"{'trained' if was_trained else 'frozen'} when the pipeline was made, which trains copies; "
                    + (f"call pipeline.freeze('{name}')" if was_trained else _TRAIN_FIRST.format(name=name))
                    + ", and do other things with a copy of your own (copy.deepcopy)"
                )

    @contextmanager
    def staying_out(self) -> Iterator[None]:
        """Raise ConfigError where the pipeline's own work, inside, gives one of them a gradient."""
        before = self._gradients()
        yield
        after = self._gradients()
        if other := [name for name in after if after[name] != before.get(name)]:
            raise ConfigError(
                f"'{other[0]}' of the modules that were given got a gradient: the loss, a hook or a block computes "
                "with it, and not with the pipeline's copy, which is what is trained; let the module that holds a "
                "weight compute what depends on it"
            )

    def _gradients(self) -> dict[str, tuple[int, int]]:
        found = {}
        for name, reference, _ in self._trained:
            item = reference()
            if item is not None and item.grad is not None:
                found[name] = id(item.grad), item.grad._version
        return found


_UNDONE = {
    "train": "so it has not trained; it trains while they are taken",
    "predict": "so it has computed nothing; it computes while they are taken",
}


class Untaken:
    """Results of `train` and `predict` that nobody has begun to take: nothing was done for them."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[weakref.ref[Iterator[object]], str]] = {}
        self._numbers = itertools.count()

    def watch(self, results: Iterator[T], call: str = "train") -> Iterator[T]:
        """Return the `results` of a `call`, which are missed when they are dropped before the first was taken."""
        number = next(self._numbers)

        def taking() -> Iterator[T]:
            self._waiting.pop(number, None)
            yield from results

        taken = taking()
        self._waiting[number] = weakref.ref(taken), call
        return taken

    def check(self) -> None:
        """Raise ExecutionError where some were dropped."""
        dropped = [(number, call) for number, (reference, call) in self._waiting.items() if reference() is None]
        for number, _ in dropped:
            del self._waiting[number]
        if dropped:
            call = dropped[0][1]
            raise ExecutionError(
                f"{call}() was called and its results were not taken, {_UNDONE[call]}: for result in "
                f"pipeline.{call}(batches): ..., or list(pipeline.{call}(batches))"
            )


class Readiness:
    """Whether a pipeline may begin something, and why not."""

    def __init__(self) -> None:
        self.untaken = Untaken()
        self._is_closed = self._is_busy = False
        self._ended_by: BaseException | None = None

    def begin(self) -> None:
        """Say that training begins, which leaves microbatches in flight until its `end`."""
        self._is_busy = True

    def end(self) -> None:
        """Say that nothing is in flight any more."""
        self._is_busy = False

    def fail(self, problem: BaseException) -> None:
        """Say what ended a program in the middle, with other ranks in it still."""
        self._ended_by = problem

    def close(self) -> None:
        """Say that the other ranks are left."""
        self._is_closed = True

    def check_open(self, *, is_world_open: bool) -> None:
        """Raise ExecutionError where the other ranks cannot be reached, or an earlier call has had no effect."""
        self.untaken.check()
        if self._is_closed or not is_world_open:
            raise ExecutionError(
                "the pipeline was closed, so its ranks cannot be reached any more; make another one, or train inside "
                "of the `with` block"
            )

    def check_idle(self) -> None:
        """Raise ExecutionError where an earlier program has not come to its end."""
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


def as_plan(plan: Plan | str) -> Plan:
    """Return the plan that is meant: a schedule's name stands for its plan with everything else left open.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(plan, str):
        return Plan(plan)
    if not isinstance(plan, Plan):
        raise ConfigError(f"plan is of type {type(plan).__name__}; give a vpipe.Plan, or the name of a schedule")
    return plan


_MOVED = {
    "schedule": "plan=vpipe.Plan('1f1b', ...)",
    **{name: f"plan=vpipe.Plan('1f1b', {name}=...)" for name in [item.name for item in fields(Plan)][1:]},
    "memory_limit": "plan=vpipe.Plan('searched', max_in_flight=...)",
    "memory_limit_bytes": "memory=vpipe.Memory(limit=...)",
    "watch_memory": "memory=vpipe.Memory(watch=...)",
    "swap_directory": "memory=vpipe.Memory(swap_directory=...)",
    "clip_grad_norm": "update=vpipe.Update(clip_grad_norm=...)",
    "learning_rate": "update=vpipe.Update(learning_rate=...)",
    "device": "world=vpipe.World.join(device=...)",
    "shared_memory": "world=vpipe.World.join(shared_memory=...)",
    "timeout_seconds": "world=vpipe.World.join(timeout_seconds=...)",
    "field_specs": "model=chain.with_field_specs(...)",
}
"""Where what was an argument of `Pipeline` is said now."""


def refusing_moved(initialise: Callable[P, None]) -> Callable[P, None]:
    """Let the `__init__` of `Pipeline` refuse what is no argument, and tell where what once was one is said now."""

    @functools.wraps(initialise)
    def checked(*arguments: P.args, **given: P.kwargs) -> None:
        _refuse_moved(given)
        initialise(*arguments, **given)

    return checked


def _refuse_moved(given: Iterable[str]) -> None:
    known = ("model", "loss", "plan", "optimizer", "update", "metrics", "memory", "world", "seed", "hooks")
    for name in given:
        if name in known:
            continue
        if name in _MOVED:
            raise ConfigError(f"Pipeline has no argument '{name}' any more; say it as {_MOVED[name]}")
        raise ConfigError(f"Pipeline has no argument '{name}'{did_you_mean(name, known)}; it has {', '.join(known)}")


def choose_batch(data: Sequence[BatchLike], fields: Mapping[str, Tensor]) -> BatchLike:
    """Return the batch that is meant by positional arguments or by keywords.

    Raises:
        DataError: there are both.
    """
    if data and fields:
        raise DataError(f"{len(data)} tensors were given in order and {', '.join(fields)} by name; give all in one way")
    return fields or (data[0] if len(data) == 1 else cast(Sequence[Tensor], data))


def count_batches(batches: Iterable[object], num_batches: int | None, *, synchronous: bool) -> int | None:
    """Return how many batches to train on; None, for a synchronous schedule alone: all there are.

    Raises:
        ConfigError: an asynchronous schedule needs to know, and `batches` has no length.
    """
    if num_batches is not None:
        if num_batches < 0:
            raise ConfigError(f"num_batches is {num_batches}; it must be at least 0")
        return num_batches
    if synchronous:
        return None
    if isinstance(batches, Sized):
        try:
            return len(batches)
        except TypeError:
            pass  # a DataLoader of an iterable dataset has a len() that only complains
    raise ConfigError(
        f"an asynchronous schedule must know when to drain, and a {type(batches).__name__} does not say how many "
        "batches it has; pass num_batches"
    )
