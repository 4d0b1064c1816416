"""The weight versions of one stage.

Each version is a parameter set of its own: copies of the stage's modules that share their buffers (batch-norm statistics are
not versioned). An update copies the newest set into one that no microbatch needs any more and steps there, so a tensor that a
saved graph refers to is never written, and V versions cost V parameter sets. With one version the update is in place.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vpipe.errors import ScheduleError

__all__ = ["WeightVersions"]


class WeightVersions:
    """Parameter sets of one stage, the gradients that wait for the next update, and its optimizer."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        names: Sequence[str],
        optimizer: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
    ) -> None:
        """Start with `modules` as the only version; `names` are their trainable parameters' model-wide names."""
        self._sets: list[nn.ModuleList] = [nn.ModuleList(modules)]
        self._parameters: list[list[nn.Parameter]] = [_trainable(self._sets[0])]
        self._set_of: dict[int, int] = {0: 0}
        self._uses: Counter[int] = Counter()
        self._newest = 0
        # The optimizer knows these; they are never part of a graph and point at the newest set's memory.
        # Taken with .data, they keep a version counter of their own: autograd's counter of a set is raised by `step`.
        self.parameters = [nn.Parameter(parameter.data) for parameter in self._parameters[0]]
        self.names = list(names)
        self.optimizer = optimizer(list(zip(names, self.parameters, strict=True))) if self.parameters else None

    @property
    def num_sets(self) -> int:
        """Count the parameter sets that were allocated."""
        return len(self._sets)

    @property
    def newest(self) -> nn.ModuleList:
        """Return the modules of the newest version."""
        return self._sets[self._set_of[self._newest]]

    def start(self, version_of: Sequence[int]) -> None:
        """Begin a program in which microbatch k uses version `version_of[k]`, counted from the newest one now."""
        self._set_of = {0: self._set_of[self._newest]}
        self._newest = 0
        self._uses = Counter(version_of)

    def modules(self, version: int) -> nn.ModuleList:
        """Return the modules of `version`.

        Raises:
            ScheduleError: the version is not there (any more).
        """
        if version not in self._set_of:
            alive = ", ".join(map(str, sorted(self._set_of)))
            raise ScheduleError(f"weight version {version} is not held; versions held: {alive}")
        return self._sets[self._set_of[version]]

    def accumulate(self, version: int, backward: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Run the last backward that uses `version` for some microbatch, adding to the gradients of the next update."""
        targets = self._parameters[self._set_of[version]]
        for parameter, master in zip(targets, self.parameters, strict=True):
            parameter.grad, master.grad = master.grad, None
        result = backward()
        for parameter, master in zip(targets, self.parameters, strict=True):
            master.grad, parameter.grad = parameter.grad, None
        self._uses[version] -= 1
        return result

    def gradients(self) -> list[Tensor | None]:
        """Return the accumulated gradients in parameter order."""
        return [parameter.grad for parameter in self.parameters]

    def step(self) -> None:
        """Make the next version from the newest one and the accumulated gradients, and forget the gradients."""
        source = self._set_of[self._newest]
        for version in [version for version in self._set_of if self._uses[version] == 0]:
            if version != self._newest:
                del self._set_of[version]
        target = source
        if self._uses[self._newest] > 0:
            target = self._free_set()
            if self.parameters:
                torch._foreach_copy_(_data(self._parameters[target]), _data(self._parameters[source]))
            for master, parameter in zip(self.parameters, self._parameters[target], strict=True):
                master.data = parameter.data
        else:
            del self._set_of[self._newest]
        self._newest += 1
        self._set_of[self._newest] = target
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        # Lets autograd notice, should a graph ever still need what was just written.
        torch.autograd.graph.increment_version(self._parameters[target])

    def _free_set(self) -> int:
        taken = set(self._set_of.values())
        for index in range(len(self._sets)):
            if index not in taken:
                return index
        copied = copy.deepcopy(self._sets[0], _shared_buffers(self._sets[0]))
        self._sets.append(copied)
        self._parameters.append(_trainable(copied))
        return len(self._sets) - 1


def _trainable(modules: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in modules.parameters() if parameter.requires_grad]


def _data(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach() for parameter in parameters]


def _shared_buffers(modules: nn.Module) -> dict[int, Tensor]:
    """Return a deepcopy memo under which buffers and frozen parameters are shared, not copied."""
    shared: list[Tensor] = list(modules.buffers())
    shared += [parameter for parameter in modules.parameters() if not parameter.requires_grad]
    return {id(tensor): tensor for tensor in shared}
