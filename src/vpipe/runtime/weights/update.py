"""One optimizer update: tied gradients, clipping, learning rate, step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vpipe.runtime.comm.wait import telling_losses
from vpipe.runtime.comm.world import World
from vpipe.runtime.hooks import Hooks
from vpipe.runtime.weights.clipping import clip_coefficient, global_norm, local_norm, scale_gradients
from vpipe.runtime.weights.weights import WeightVersions

__all__ = ["LearningRate", "TiedCopy", "TiedGroup", "Updater"]

LearningRate = Callable[[float], float]
"""The rate of an update, from the iterations done before it."""


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
    """

    def __init__(
        self,
        weights: Mapping[int, WeightVersions],
        parameter_names: Sequence[str],
        tied: Sequence[TiedGroup],
        *,
        synchronous: bool,
        clip_grad_norm: float | None,
        learning_rate: LearningRate | None,
        world: World,
        hooks: Hooks,
    ) -> None:
        self._weights = weights
        self._positions = {name: index for index, name in enumerate(parameter_names)}
        # A tied weight is one parameter: only its first copy counts towards the norm.
        self._repeats = {copy.name for item in tied for copy in item.copies[1:]}
        self._tied = tied
        self._synchronous = synchronous
        self._clip = clip_grad_norm
        self._learning_rate = learning_rate
        self._world = world
        self._hooks = hooks
        self._due: list[tuple[int, int, float]] = []
        self.gradient_norm: float | None = None
        self._equalise_tied()

    def step(self, stage: int, microbatch: int, progress: float) -> None:
        """Update `stage`, whose last gradient is of `microbatch`.

        `progress` is the number of iterations done, fractional in asynchronous schedules.
        """
        self._due.append((stage, microbatch, progress))
        if self._synchronous and len(self._due) < len(self._weights):
            return
        due, self._due = self._due, []
        held = {index: self._weights[index] for index, _, _ in due}
        self._sum_tied(held)
        if self._clip is not None:
            self._clip_gradients(held, self._clip)
        for index, number, iterations in due:
            self._apply(index, number, iterations)

    def _apply(self, stage: int, microbatch: int, progress: float) -> None:
        weights = self._weights[stage]
        if self._hooks.gradients is not None:
            self._hooks.gradients(stage, microbatch, dict(_named(weights)))
        if self._learning_rate is not None and weights.optimizer is not None:
            for parameters in weights.optimizer.param_groups:
                parameters["lr"] = self._learning_rate(progress)
        weights.step()

    def _sum_tied(self, held: Mapping[int, WeightVersions]) -> None:
        for item in self._tied:
            mine = {copy: _gradient(held[copy.stage], copy.name) for copy in item.copies if copy.stage in held}
            if not mine:
                continue
            total: Tensor | None = None
            for copy in item.copies:
                part = mine[copy] if copy in mine else torch.empty_like(next(iter(mine.values())))
                if item.group is not None:
                    with self._collective("the gradient of a tied weight"):
                        dist.broadcast(part, self._world.processes[copy.rank], group=item.group)
                # All have the first part by now, and it is overwritten below: it needs no copy.
                total = part if total is None else total.add_(part)
            assert total is not None
            for gradient in mine.values():
                gradient.copy_(total)

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
                with telling_losses("a tied weight"):
                    dist.broadcast(first, self._world.processes[item.copies[0].rank], group=item.group)
            for parameter in mine:
                parameter.detach().copy_(first)

    def _clip_gradients(self, held: Mapping[int, WeightVersions], most: float) -> None:
        named = [item for weights in held.values() for item in _named(weights)]
        counted = [(name, gradient) for name, gradient in named if name not in self._repeats]
        if self._synchronous:
            placed = [(self._positions[name], gradient) for name, gradient in counted]
            with self._collective("the gradient norm"):
                self.gradient_norm = global_norm(placed, len(self._positions), self._world.peers)
        else:
            self.gradient_norm = local_norm([gradient for _, gradient in counted])
        scale_gradients([gradient for _, gradient in named], clip_coefficient(self.gradient_norm, most))

    @contextmanager
    def _collective(self, what: str) -> Iterator[None]:
        self._hooks.announce(f"waiting for {what} from other ranks")
        start = time.perf_counter_ns()
        with telling_losses(what):
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
