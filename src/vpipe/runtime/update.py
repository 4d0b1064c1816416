"""One optimizer update of one stage: tied gradients, clipping, learning rate, step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vpipe.runtime.clipping import clip_coefficient, global_norm, local_norm, scale_gradients
from vpipe.runtime.weights import WeightVersions

__all__ = ["TiedCopy", "TiedGroup", "Updater"]


@dataclass(frozen=True)
class TiedCopy:
    """One of several parameters that are one weight."""

    stage: int
    rank: int
    name: str


@dataclass(frozen=True)
class TiedGroup:
    """Copies of one weight in block order, and the process group of the ranks that hold them (None: all on one rank)."""

    copies: tuple[TiedCopy, ...]
    group: dist.ProcessGroup | None


class Updater:
    """Applies updates; one per rank.

    In a synchronous schedule all stages of a batch update together: tied gradients are summed in block order and clipping
    uses the norm over all stages. In an asynchronous one there is no common moment: each stage clips by its own norm.
    """

    def __init__(
        self,
        weights: Mapping[int, WeightVersions],
        parameter_names: Sequence[str],
        tied: Sequence[TiedGroup],
        *,
        synchronous: bool,
        clip_grad_norm: float | None,
        learning_rate: Callable[[float], float] | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._weights = weights
        self._positions = {name: index for index, name in enumerate(parameter_names)}
        # A tied weight is one parameter: only its first copy counts towards the norm.
        self._repeats = {copy.name for item in tied for copy in item.copies[1:]}
        self._tied = tied
        self._synchronous = synchronous
        self._clip = clip_grad_norm
        self._learning_rate = learning_rate
        self._group = group
        self._stages_left = 0
        self.gradient_norm: float | None = None
        self.observe: Callable[[int, Mapping[str, Tensor]], None] | None = None
        """Called with a stage and its gradients by name, before each of its updates."""

    def step(self, stage: int, progress: float) -> None:
        """Update `stage`; `progress` is the number of iterations done, fractional in asynchronous schedules."""
        weights = self._weights[stage]
        if self._synchronous and self._stages_left == 0:
            self._stages_left = len(self._weights)
            self._sum_tied()
            if self._clip is not None:
                self._clip_all()
        elif self._clip is not None and not self._synchronous:
            named = self._named(weights)
            self.gradient_norm = local_norm([gradient for name, gradient in named if name not in self._repeats])
            scale_gradients([gradient for _, gradient in named], clip_coefficient(self.gradient_norm, self._clip))
        if self._synchronous:
            self._stages_left -= 1
        if self.observe is not None:
            self.observe(stage, dict(self._named(weights)))
        if self._learning_rate is not None and weights.optimizer is not None:
            for parameters in weights.optimizer.param_groups:
                parameters["lr"] = self._learning_rate(progress)
        weights.step()

    def _sum_tied(self) -> None:
        for item in self._tied:
            mine = {copy: self._gradient(copy) for copy in item.copies if copy.stage in self._weights}
            if not mine:
                continue
            total: Tensor | None = None
            for copy in item.copies:
                part = mine[copy] if copy in mine else torch.empty_like(next(iter(mine.values())))
                if item.group is not None:
                    dist.broadcast(part, copy.rank, group=item.group)
                total = part.clone() if total is None else total.add_(part)
            assert total is not None
            for gradient in mine.values():
                gradient.copy_(total)

    def _gradient(self, copy: TiedCopy) -> Tensor:
        weights = self._weights[copy.stage]
        parameter = weights.parameters[weights.names.index(copy.name)]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def _clip_all(self) -> None:
        assert self._clip is not None
        named = [item for weights in self._weights.values() for item in self._named(weights)]
        placed = [(self._positions[name], gradient) for name, gradient in named if name not in self._repeats]
        self.gradient_norm = global_norm(placed, len(self._positions), self._group)
        scale_gradients([gradient for _, gradient in named], clip_coefficient(self.gradient_norm, self._clip))

    @staticmethod
    def _named(weights: WeightVersions) -> list[tuple[str, Tensor]]:
        pairs = zip(weights.names, weights.gradients(), strict=True)
        return [(name, gradient) for name, gradient in pairs if gradient is not None]
