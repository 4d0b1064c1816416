"""The weight versions of one stage.

Each version is a parameter set of its own: copies of the stage's modules that share their buffers (batch-norm
statistics are not versioned). An update copies the newest set into one that no microbatch needs any more and steps
there, so a tensor that a saved graph refers to is never written, and V versions cost V parameter sets. With one version
the update is in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from vpipe.errors import ScheduleError
from vpipe.model.copying import copy_module, like_parameter
from vpipe.runtime.weights.plain_state import PlainState, written_to
from vpipe.runtime.weights.stage_optimizer import OptimizerFactory, StageOptimizer

__all__ = ["Resized", "WeightVersions"]

T = TypeVar("T")


class Resized(Protocol):
    """Is told of memory that is taken (positive) or freed, and whether the host link did it, on its own thread."""

    def __call__(self, num_bytes: int, *, by_link: bool = False) -> None:
        """Take note."""


class WeightVersions:
    """Parameter sets of one stage, the gradients that wait for the next update, and its optimizer.

    `parameters` are what the optimizer steps on, in the order of `names`: the newest version, and the gradients.
    """

    def __init__(self, modules: Sequence[nn.Module], names: Sequence[str], optimizer: OptimizerFactory) -> None:
        """Start with `modules` as the only version; `names` are their trainable parameters' model-wide names.

        Raises:
            ConfigError: `optimizer` does not make an optimizer of these parameters.
        """
        self._sets: list[nn.ModuleList] = [nn.ModuleList(modules)]
        self._plain = PlainState(self._sets)
        self._places = [place for place, item in enumerate(self._sets[0].parameters()) if item.requires_grad]
        self._frozen: set[str] = set()
        self._parameters: list[list[nn.Parameter]] = [self._trainable(self._sets[0])]
        self._set_of: dict[int, int] = {0: 0}
        self._uses: Counter[int] = Counter()
        self._newest = 0
        # The optimizer knows these; they are never part of a graph and point at the newest set's memory.
        # Taken with .data, they keep a version counter of their own: autograd's counter of a set is raised by `step`.
        self.parameters = [like_parameter(parameter.data, parameter) for parameter in self._parameters[0]]
        self.names = list(names)
        self.resized: Resized = _ignore
        """Is told by how many bytes the memory of all sets together grows."""
        named = list(zip(names, self.parameters, strict=True))
        self.optimizer = StageOptimizer(optimizer, named) if named else None

    @property
    def num_sets(self) -> int:
        """Count the parameter sets that were allocated."""
        return len(self._sets)

    def older_bytes(self) -> int:
        """Return the bytes that sets take besides the newest."""
        return (len(self._sets) - 1) * self._set_bytes()

    @property
    def newest(self) -> nn.ModuleList:
        """Return the modules of the newest version."""
        return self._sets[self._set_of[self._newest]]

    @property
    def sets(self) -> Sequence[nn.ModuleList]:
        """Return the modules of all sets, whether a version is in them or not."""
        return self._sets

    def trained(self, version: int) -> list[tuple[str, nn.Parameter]]:
        """Return those parameters of `version` that get gradients now, with their names."""
        pairs = zip(self.names, self._parameters[self._set_of[version]], strict=True)
        return [(name, item) for name, item in pairs if name not in self._frozen]

    def freeze(self, names: Collection[str]) -> None:
        """Let the parameters with `names` get no gradients from now on, and all others have some."""
        self._frozen = {name for name in self.names if name in names}
        for parameters in self._parameters:
            self._switch(parameters)

    def _switch(self, parameters: Sequence[nn.Parameter]) -> None:
        for name, item in zip(self.names, parameters, strict=True):
            if item.requires_grad == (name in self._frozen):
                item.requires_grad_(name not in self._frozen)

    def _trainable(self, modules: nn.Module) -> list[nn.Parameter]:
        """Return a set's parameters that can be trained, whether they are now or not."""
        every = list(modules.parameters())
        return [every[place] for place in self._places]

    def start(self, version_of: Sequence[int]) -> None:
        """Begin a program in which microbatch k uses version `version_of[k]`, counted from the newest one now."""
        self._set_of = {0: self._set_of[self._newest]}
        self._newest = 0
        self._uses = Counter(version_of)
        if len(self._sets) > 1:
            self._plain.look()

    def modules(self, version: int) -> nn.ModuleList:
        """Return the modules of `version`.

        Raises:
            ScheduleError: the version is not there (any more).
        """
        if version not in self._set_of:
            alive = ", ".join(map(str, sorted(self._set_of)))
            raise ScheduleError(f"weight version {version} is not held; versions held: {alive}")
        return self._sets[self._set_of[version]]

    def for_forward(self, version: int | None = None) -> nn.ModuleList:
        """Return the modules of `version`, or of the newest, for a forward: it goes on from the latest one's state.

        Raises:
            ScheduleError: as `modules`.
        """
        version = self._newest if version is None else version
        modules = self.modules(version)
        self._plain.enter(self._set_of[version])
        return modules

    def accumulate(self, version: int, backward: Callable[[], T], *, is_last_use: bool = True) -> T:
        """Run the backward of one microbatch that used `version`; its gradients add to those of the next update.

        `is_last_use` is False for the first half of a split backward: the second needs the version again.
        """
        targets = self._parameters[self._set_of[version]]
        for parameter, master in zip(targets, self.parameters, strict=True):
            parameter.grad, master.grad = master.grad, None
        result = backward()
        for parameter, master in zip(targets, self.parameters, strict=True):
            master.grad, parameter.grad = parameter.grad, None
        self._uses[version] -= is_last_use
        return result

    def gradients(self) -> list[Tensor | None]:
        """Return the accumulated gradients in parameter order."""
        return [parameter.grad for parameter in self.parameters]

    def optimizer_state(self) -> Iterator[Tensor]:
        """Yield the tensors that the optimizer keeps."""
        for state in self.optimizer.state.values() if self.optimizer is not None else ():
            yield from (item for item in state.values() if isinstance(item, Tensor))

    def untrained(self) -> Iterator[Tensor]:
        """Yield buffers and parameters that were frozen from the start, which all versions share."""
        yield from self._sets[0].buffers()
        yield from self._never_trained()

    def step(self, *, apply: bool = True) -> None:
        """Make the next version from the newest one and the accumulated gradients, and forget the gradients.

        Without `apply` the next version has the weights of the newest.
        """
        self._drop_unused()
        target = self._set_of[self._newest]
        if self._uses[self._newest] > 0:
            target = self._copy_newest()
        else:
            del self._set_of[self._newest]
        self._newest += 1
        self._set_of[self._newest] = target
        if self.optimizer is not None and apply:
            self.optimizer.step()
            # A caller's autocast keeps copies of weights in its type; these are of the version before.
            torch.clear_autocast_cache()
        self.forget_gradients()
        # Lets autograd notice, should a graph ever still need what was just written.
        torch.autograd.graph.increment_version(self._parameters[target])

    def forget_gradients(self) -> None:
        """Drop what was accumulated for the next update."""
        for parameter in self.parameters:
            parameter.grad = None

    def _drop_unused(self) -> None:
        for version in list(self._set_of):
            if version != self._newest and not self._uses[version]:
                del self._set_of[version]

    def _copy_newest(self) -> int:
        """Copy the newest version into a free set and let the optimizer work there; return the set."""
        target = self._free_set()
        source = self._parameters[self._set_of[self._newest]]
        for master, parameter, old in zip(self.parameters, self._parameters[target], source, strict=True):
            data = parameter.data
            data.copy_(old.data)
            master.data = data
        return target

    def _free_set(self) -> int:
        taken = set(self._set_of.values())
        for index in range(len(self._sets)):
            if index not in taken:
                return index
        return self._add_set({})

    def _add_set(self, parameters: Mapping[int, nn.Parameter]) -> int:
        """Make one more set, with copies of the trained parameters or those given, by the identity of the original."""
        self.resized(self._set_bytes())
        copied = copy_module(self._sets[0], {**self._shared(), **parameters})
        assert isinstance(copied, nn.ModuleList)
        self._sets.append(copied)
        self._plain.look()
        self._parameters.append(self._trainable(copied))
        self._switch(self._parameters[-1])
        return len(self._sets) - 1

    def _never_trained(self) -> list[nn.Parameter]:
        trained = set(self._places)
        return [item for place, item in enumerate(self._sets[0].parameters()) if place not in trained]

    def _shared(self) -> dict[int, object]:
        """Return a deepcopy memo of what sets share: all that is not trained, and buffers even when reassigned."""
        buffers = [part._buffers for part in self._sets[0].modules()]
        return {id(item): item for item in (*self._never_trained(), *buffers, *written_to(self._sets[0]))}

    def _set_bytes(self) -> int:
        storages = {storage.data_ptr(): storage for storage in map(Tensor.untyped_storage, self.parameters)}
        return sum(storage.nbytes() for storage in storages.values())


def _ignore(num_bytes: int, *, by_link: bool = False) -> None:
    """Tell nobody."""
