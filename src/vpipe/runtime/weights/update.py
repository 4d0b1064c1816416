"""One optimizer update: tied gradients, clipping, learning rate, step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vpipe.errors import ConfigError
from vpipe.runtime.comm.world import World
from vpipe.runtime.hooks import Hooks
from vpipe.runtime.weights.clipping import (
    are_finite,
    clip_coefficient,
    device_of,
    global_norm,
    local_norm,
    scale_gradients,
)
from vpipe.runtime.weights.weights import WeightVersions

__all__ = ["LearningRate", "TiedCopy", "TiedGroup", "Update", "Updater"]

LearningRate = Callable[[float], float]
"""The rate of an update, from the iterations done before it."""


OnNonFinite = Literal["stop", "skip"]


@dataclass(frozen=True)
class Update:
    """What an update does beside the optimizer.

    Args:
        clip_grad_norm: largest gradient norm, over all stages (asynchronous: over each stage).
        learning_rate: the rate as a function of iterations done, instead of the optimizer's own (the largest, where
            there are several; where every group has its own, the largest of these). A group that was made with another
            rate keeps the ratio to that.
        on_non_finite: an update whose loss is NaN or infinite is never applied, nor one with such gradients where they
            are looked at: in asynchronous schedules, with clipping, with `measure_norm` and with `skip`. `stop` ends
            the training with an error, `skip` goes on with the next batch and counts.
        measure_norm: tell the gradient norm without clipping, too; in a synchronous schedule all ranks wait for it.

    Raises:
        ConfigError: a norm that is not above 0, a rate that is no function, or another word.
    """

    clip_grad_norm: float | None = None
    learning_rate: LearningRate | None = None
    on_non_finite: OnNonFinite = "stop"
    measure_norm: bool = False

    def __post_init__(self) -> None:
        if self.on_non_finite not in get_args(OnNonFinite):
            known = ", ".join(get_args(OnNonFinite))
            raise ConfigError(f"on_non_finite is {self.on_non_finite!r}; choose one of {known}")
        if not isinstance(self.measure_norm, bool):
            raise ConfigError(f"measure_norm is {self.measure_norm!r}; give True or False")
        if self.clip_grad_norm is not None and not isinstance(self.clip_grad_norm, Real):
            raise ConfigError(f"clip_grad_norm is {self.clip_grad_norm!r}; give a number above 0, or None")
        if self.learning_rate is not None and not callable(self.learning_rate):
            raise ConfigError(
                f"learning_rate is {self.learning_rate!r}; give a function of the iterations done, or set a constant "
                "rate in the optimizer"
            )
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ConfigError(
                f"clip_grad_norm is {self.clip_grad_norm}; give a number above 0, or None for no clipping"
            )

    def facts(self) -> dict[str, object]:
        """Return what ranks must agree on."""
        return {
            "clip_grad_norm": self.clip_grad_norm,
            "on_non_finite": self.on_non_finite,
            "measure_norm": self.measure_norm,
        }


@dataclass(frozen=True)
class TiedCopy:
    """One of several parameters that are one weight."""

    stage: int
    rank: int
    name: str


@dataclass(frozen=True)
class TiedGroup:
    """Copies of one weight in block order, and the group of the ranks that hold them (None: all are on one rank)."""

    copies: tuple[TiedCopy, ...]
    group: dist.ProcessGroup | None


class Updater:
    """Applies updates; one per rank. Making one is collective: copies of a tied weight start equal, as the first is.

    In a synchronous schedule all stages of a batch update together, which on each rank is at the last of its STEPs:
    tied gradients are summed in block order and clipping uses the norm over all stages. In an asynchronous one there is
    no common moment: each stage clips by its own norm.

    What is not finite is not applied. In a synchronous schedule no stage updates after a batch whose loss is not
    finite, which `loss_of_batch` tells all ranks at the same moment, or whose norm is not, where that is taken; and
    with `skip` no stage updates where the gradients of another one are not finite. In an asynchronous one each
    stage looks at its own gradients.
    """

    def __init__(
        self,
        weights: Mapping[int, WeightVersions],
        parameter_names: Sequence[str],
        tied: Sequence[TiedGroup],
        update: Update,
        *,
        synchronous: bool,
        loss_of_batch: Callable[[], float],
        world: World,
        hooks: Hooks,
    ) -> None:
        self._weights = weights
        self._positions = {name: index for index, name in enumerate(parameter_names)}
        # A tied weight is one parameter: only its first copy counts towards the norm.
        self._repeats = {copy.name for item in tied for copy in item.copies[1:]}
        self._tied = tied
        self._synchronous = synchronous
        self._clip = update.clip_grad_norm
        self._measures = update.measure_norm or update.clip_grad_norm is not None
        self._skipping = update.on_non_finite == "skip"
        self._learning_rate = update.learning_rate
        self._loss_of_batch = loss_of_batch
        self._world = world
        self._hooks = hooks
        self._due: list[tuple[int, int, float]] = []
        self.gradient_norm: float | None = None
        self.refused: dict[tuple[int, int], str] = {}
        """Stage and last microbatch of the updates that were not applied, and what was not finite."""
        self._usual_rate = self._find_usual_rate() if self._learning_rate is not None else 0.0
        self._equalise_tied()

    def _find_usual_rate(self) -> float:
        """Return the rate that `learning_rate` stands for, of all stages: a stage may have unusual groups alone."""
        own = [item.optimizer.usual_rates() for item in self._weights.values() if item.optimizer is not None]
        every = self._world.gather(own, "the learning rates of all stages")
        usual, largest = (max((pair[index] for rates in every for pair in rates), default=0.0) for index in (0, 1))
        return usual or largest

    def step(self, stage: int, microbatch: int, progress: float) -> None:
        """Update `stage`, whose last gradient is of `microbatch`.

        `progress` is the number of iterations done, fractional in asynchronous schedules.
        """
        self._due.append((stage, microbatch, progress))
        if self._synchronous and len(self._due) < len(self._weights):
            return
        due, self._due = self._due, []
        held = {index: self._weights[index] for index, _, _ in due}
        if (reason := self._prepare(held)) is not None:
            self.refused.update({(index, number): reason for index, number, _ in due})
            for weights in held.values():
                weights.step(apply=False)
            return
        for index, number, iterations in due:
            self._apply(index, number, iterations)

    def take_refused(self, microbatches: range) -> list[str]:
        """Return what kept updates that end with one of `microbatches` from being applied, and forget it."""
        found = [key for key in self.refused if key[1] in microbatches]
        return [self.refused.pop(key) for key in found]

    def forget(self) -> None:
        """Drop updates that wait for those of other stages."""
        self._due.clear()
        self.refused.clear()

    def _prepare(self, held: Mapping[int, WeightVersions]) -> str | None:
        """Make gradients ready for the update; return what is not finite in them or in their loss."""
        if self._synchronous and not math.isfinite(loss := self._loss_of_batch()):
            self.gradient_norm = None
            return f"the loss became {loss}"
        self._sum_tied(held)
        if self._measures:
            self.gradient_norm = norm = self._measure(held)
            if not math.isfinite(norm):
                return f"the gradient norm became {norm}"
            if self._clip is not None:
                gradients = [gradient for weights in held.values() for _, gradient in _named(weights)]
                scale_gradients(gradients, clip_coefficient(norm, self._clip))
        elif not self._synchronous or self._skipping:
            finite = are_finite([gradient for weights in held.values() for _, gradient in _named(weights)])
            if not (self._all_are(finite) if self._synchronous else finite):
                return "a gradient became NaN or infinite"
        return None

    def _all_are(self, finite: bool) -> bool:
        """Tell whether this holds on all ranks; collective."""
        if self._world.peers is None:
            return finite
        with self._collective("whether gradients are finite"):
            votes = torch.tensor([finite], dtype=torch.float64, device=device_of(self._world.peers))
            dist.all_reduce(votes, dist.ReduceOp.MIN, group=self._world.peers)
            return bool(votes.item())

    def _apply(self, stage: int, microbatch: int, progress: float) -> None:
        weights = self._weights[stage]
        if self._hooks.gradients is not None:
            self._hooks.gradients(stage, microbatch, dict(_named(weights)))
        if self._learning_rate is not None and weights.optimizer is not None:
            weights.optimizer.set_rate(self._learning_rate(progress), self._usual_rate)
        weights.step()

    def _sum_tied(self, held: Mapping[int, WeightVersions]) -> None:
        for item in self._tied:
            own = [copy for copy in item.copies if copy.stage in held]
            if not own or not self._is_used(item, [_parameter(held[copy.stage], copy.name) for copy in own]):
                continue
            mine = {copy: _gradient(held[copy.stage], copy.name) for copy in own}
            total: Tensor | None = None
            for copy in item.copies:
                part = mine[copy] if copy in mine else torch.empty_like(next(iter(mine.values())))
                if item.group is not None:
                    with self._collective("the gradient of a tied weight", item):
                        dist.broadcast(part, self._world.processes[copy.rank], group=item.group)
                # All have the first part by now, and it is overwritten below: it needs no copy.
                total = part if total is None else total.add_(part)
            assert total is not None
            for gradient in mine.values():
                gradient.copy_(total)

    def _is_used(self, tied: TiedGroup, own: Sequence[nn.Parameter]) -> bool:
        """Tell whether any copy of a weight has a gradient: to an optimizer none is something else than zero."""
        is_used = any(parameter.grad is not None for parameter in own)
        if tied.group is None:
            return is_used
        with self._collective("whether a tied weight was used", tied):
            votes = torch.tensor([is_used], dtype=torch.float64, device=device_of(tied.group))
            dist.all_reduce(votes, dist.ReduceOp.MAX, group=tied.group)
            return bool(votes.item())

    def _equalise_tied(self) -> None:
        for item in self._tied:
            mine = [
                _parameter(self._weights[copy.stage], copy.name) for copy in item.copies if copy.stage in self._weights
            ]
            if not mine:
                continue
            # The first of mine is the first of all on the rank that sends.
            first = mine[0].detach().clone()
            if item.group is not None:
                with self._among("a tied weight", item):
                    dist.broadcast(first, self._world.processes[item.copies[0].rank], group=item.group)
            for parameter in mine:
                parameter.detach().copy_(first)

    def _measure(self, held: Mapping[int, WeightVersions]) -> float:
        """Return the norm of the gradients: synchronous, of all ranks, which is collective; or else of these stages."""
        named = [item for weights in held.values() for item in _named(weights)]
        counted = [(name, gradient) for name, gradient in named if name not in self._repeats]
        if not self._synchronous:
            return local_norm([gradient for _, gradient in counted])
        placed = [(self._positions[name], gradient) for name, gradient in counted]
        with self._collective("the gradient norm"):
            return global_norm(placed, len(self._positions), self._world.peers)

    def _among(self, what: str, tied: TiedGroup | None) -> AbstractContextManager[None]:
        """Meet the ranks that hold a tied weight inside; None: all of them."""
        if tied is None:
            return self._world.activity.meeting(what, self._world.peers)
        others = {copy.rank for copy in tied.copies} - {self._world.rank}
        return self._world.activity.waiting(what, sorted(others), tied.group)

    @contextmanager
    def _collective(self, what: str, tied: TiedGroup | None = None) -> Iterator[None]:
        self._hooks.announce(f"waiting for {what} from other ranks")
        start = time.perf_counter_ns()
        with self._among(what, tied):
            yield
        self._hooks.waited(time.perf_counter_ns() - start)
        self._hooks.announce("running")


def _named(weights: WeightVersions) -> list[tuple[str, Tensor]]:
    pairs = zip(weights.names, weights.gradients(), strict=True)
    return [(name, gradient) for name, gradient in pairs if gradient is not None]


def _parameter(weights: WeightVersions, name: str) -> nn.Parameter:
    return weights.parameters[weights.names.index(name)]


def _gradient(weights: WeightVersions, name: str) -> Tensor:
    parameter = _parameter(weights, name)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
