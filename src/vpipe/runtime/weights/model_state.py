"""The weights and buffers of a model that is spread over ranks: told and taken by their names in the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vpipe.errors import ConfigError, ModelError
from vpipe.model.chain import Chain
from vpipe.runtime.comm.agreement import agree, checksum
from vpipe.runtime.comm.world import World
from vpipe.runtime.weights.weights import WeightVersions
from vpipe.words.near import did_you_mean

__all__ = ["IncompatibleKeys", "ModelState"]

Which = str | Iterable[str] | Callable[[str], bool]
"""Weights by their names or those of modules, or by a function of each one's name."""

_SHOWN = 8


class _Blocks(Protocol):
    """A stage, as far as it is asked here."""

    start: int

    def look_again(self) -> None: ...


class _Held(Protocol):
    """A stage on this rank, with its weights."""

    @property
    def stage(self) -> _Blocks: ...

    @property
    def weights(self) -> WeightVersions: ...


class _Inference(Protocol):
    """What infers which values need gradients where, from what is trained."""

    @property
    def frozen(self) -> frozenset[str]: ...

    def assume_frozen(self, names: Collection[str]) -> None: ...


class IncompatibleKeys(NamedTuple):
    """Names of the model that a state has not, and of the state that the model has not."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class ModelState:
    """What holds stages of a chain, and tells and takes their state by the names that are in the whole model."""

    chain: Chain
    world: World

    _parts: Collection[_Held]
    """The stages of this rank."""
    _inference: _Inference
    """What is to know of frozen weights, and knows which are."""
    _check_idle: Callable[[], None]
    """Raises ExecutionError while microbatches are in flight."""

    def state_dict(self) -> dict[str, Any]:
        """Return the newest weights and the buffers of this rank's blocks, by their names in the whole model.

        The dictionaries of all ranks together are the model's; for an `nn.Sequential`, what its own would be. Tensors
        are copies: later training does not change them.
        """
        return _read(self.chain, self._parts)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> IncompatibleKeys:
        """Take weights and buffers from `state`, which has the names of `state_dict`; collective.

        Every rank gives the whole model's state or its own part. With `strict` names must be those of the model. What
        optimizers keep stays as it is.

        Raises:
            ModelError: the state does not fit the model, or is not the same on all ranks; nothing was loaded.
            ExecutionError: microbatches are in flight.
        """
        self._check_idle()
        return _write(self.chain, self._parts, state, self.world, strict=strict)

    def freeze(self, which: Which) -> list[str]:
        """Train some weights no more, as `requires_grad_(False)` does in one process; collective.

        `which` is a name of a weight or of a module, several of them, or a function that is given each weight's name;
        names are those of `state_dict`. The optimizer passes over such weights and keeps what it has of them.

        Returns:
            The names of all weights that are frozen now, of those that were trained when the pipeline was made.

        Raises:
            ConfigError: no weight of the model is called so, or ranks do not agree.
            ExecutionError: microbatches are in flight.
        """
        return self._freeze(lambda frozen: frozen | _chosen(self.chain, which))

    def unfreeze(self, which: Which) -> list[str]:
        """Train weights again that `freeze` has taken out; otherwise like that."""
        return self._freeze(lambda frozen: frozen - _chosen(self.chain, which))

    def _freeze(self, change: Callable[[frozenset[str]], frozenset[str]]) -> list[str]:
        self._check_idle()
        frozen = change(self._inference.frozen)
        agree({"frozen weights": sorted(frozen)}, self.world)
        if frozen != self._inference.frozen:
            self._inference.assume_frozen(frozen)
            for part in self._parts:
                part.weights.freeze(frozen)
                part.stage.look_again()
        return sorted(frozen)


def _chosen(chain: Chain, which: Which) -> set[str]:
    """Return the trained weights that are meant, all copies of one weight with one of them.

    Raises:
        ConfigError: a name is of none of them.
    """
    trained = [name for named in chain.parameter_sizes() for name in named]
    if callable(which):
        chosen = {name for name in trained if which(name)}
    else:
        chosen = set()
        for part in [which] if isinstance(which, str) else which:
            found = {name for name in trained if name == part or name.startswith(f"{part}.")}
            if not found:
                never = [name for name in chain.given_weights() if name == part or name.startswith(f"{part}.")]
                why = (
                    "; it was frozen when the pipeline was made, so no optimizer has it: make it with the weight "
                    "trained, and freeze that then"
                    if never
                    else did_you_mean(part, trained)
                )
                raise ConfigError(f"no trained weight of the model is called '{part}'{why}")
            chosen |= found
    for group in chain.tied:
        names = {chain.blocks[ref.block].global_name(ref.name) for ref in group}
        if names & chosen:
            chosen |= names
    return chosen


def _read(chain: Chain, held: Iterable[_Held]) -> dict[str, Any]:
    """Return copies of the newest weights, the buffers and the extra state of some stages, by names in the model."""
    return {
        chain.blocks[block].global_name(local): item.detach().clone()
        if isinstance(item, Tensor)
        else copy.deepcopy(item)
        for stage in held
        for block, module in _blocks(stage)
        for local, item in module.state_dict().items()
    }


def _write(
    chain: Chain, held: Iterable[_Held], state: Mapping[str, Any], world: World, *, strict: bool
) -> IncompatibleKeys:
    """Write `state` into the newest weights and the buffers of this rank's stages; collective.

    Ranks find out together what does not fit before any of them writes.

    Raises:
        ModelError: something does not fit; the same on every rank.
    """
    own = _look(chain, held, state)
    reports = world.gather(own, "all ranks to load a state")
    known = dict.fromkeys(name for report in reports for name in report.names)
    missing = list(dict.fromkeys(name for report in reports for name in report.missing))
    given = dict.fromkeys(name for report in reports for name in report.given)
    unexpected = [name for name in given if name not in known]
    problems = list(dict.fromkeys(problem for report in reports for problem in report.problems))
    problems += [*_differing(reports), *_apart(chain, reports)]
    if strict:
        problems = [*_odd_keys(missing, unexpected, list(known)), *problems]
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ModelError(f"the state does not fit the model: {'; '.join(problems[:_SHOWN])}{more}")
    tied = _tied_values(chain, state)
    for stage in held:
        for index, (block, module) in enumerate(_blocks(stage)):
            local = _local(chain, block, module, state, tied)
            _load(module, local)
            extra = {name: item for name, item in local.items() if not isinstance(item, Tensor)}
            if extra:  # what is no tensor is not shared by the sets of weights
                for other in stage.weights.sets:
                    _load(other[index], extra)
    return IncompatibleKeys(missing, unexpected)


@dataclass
class _Report:
    """What one rank finds: names that it holds, what of them the state has not, and what else is wrong."""

    names: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    given: dict[str, int | None] = field(default_factory=dict)
    """All names in the state, with checksums of tensors."""
    tied: dict[int, int | None] = field(default_factory=dict)
    """By group of tied weights of which it holds a copy: the checksum of what that becomes; None: it stays."""


def _look(chain: Chain, held: Iterable[_Held], state: Mapping[str, Any]) -> _Report:
    if not isinstance(state, Mapping):
        raise ModelError(f"the state is of type {type(state).__name__}; give a dictionary of tensors by name")
    report = _Report(given={name: _sum(item) for name, item in state.items()})
    blocks = [pair for stage in held for pair in _blocks(stage)]
    for block, module in blocks:
        for local, item in module.state_dict().items():
            name = chain.blocks[block].global_name(local)
            report.names.append(name)
            if name not in state:
                report.missing.append(name)
            elif problem := _misfit(name, item, state[name]):
                report.problems.append(problem)
    holding, tied = {block for block, _ in blocks}, _tied_values(chain, state)
    for number, group in enumerate(chain.tied):
        if any(ref.block in holding for ref in group):
            report.tied[number] = _sum(tied[number]) if number in tied else None
    return report


def _sum(item: object) -> int | None:
    return checksum(item) if isinstance(item, Tensor) and not item.is_meta else None


def _misfit(name: str, item: object, given: object) -> str:
    """Say what is wrong with what is `given` for `item`; nothing where it fits."""
    if not isinstance(item, Tensor):
        return ""
    if not isinstance(given, Tensor):
        return f"'{name}' is a tensor and a {type(given).__name__} was given"
    if given.is_meta:
        return f"the tensor that was given for '{name}' is on the meta device and has no values"
    if item.shape != given.shape and not (item.dim() == 0 and given.shape == (1,)):  # torch takes these, too
        return f"size mismatch for '{name}': it has shape {tuple(item.shape)} and {tuple(given.shape)} was given"
    return ""


def _differing(reports: Sequence[_Report]) -> Iterator[str]:
    """Tell of the first tensor that ranks were given different values of."""
    first: dict[str, tuple[int, int | None]] = {}
    for rank, report in enumerate(reports):
        for name, found in report.given.items():
            other, expected = first.setdefault(name, (rank, found))
            if found != expected:
                yield (
                    f"rank {other} and rank {rank} were given different values of '{name}': read the same file on "
                    "every rank"
                )
                return


def _apart(chain: Chain, reports: Sequence[_Report]) -> Iterator[str]:
    """Tell of tied weights whose copies would drift apart, as ranks were given parts of the state."""
    for number, group in enumerate(chain.tied):
        if len({report.tied[number] for report in reports if number in report.tied}) > 1:
            names = " and ".join(f"'{chain.blocks[ref.block].global_name(ref.name)}'" for ref in group)
            yield f"{names} are one weight, and the ranks that hold it were given other values, or some of them none"


def _odd_keys(missing: Sequence[str], unexpected: Sequence[str], known: Sequence[str]) -> Iterator[str]:
    if missing:
        yield f"missing keys: {_listed(missing)}"
    if unexpected:
        yield f"unexpected keys: {_listed(unexpected)}{did_you_mean(unexpected[0], missing or known)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + more


def _blocks(stage: _Held) -> Iterator[tuple[int, nn.Module]]:
    yield from enumerate(stage.weights.newest, start=stage.stage.start)


def _tied_values(chain: Chain, state: Mapping[str, Any]) -> dict[int, Any]:
    """Return what each group of tied weights becomes: as in torch the last one that is given, in model order."""
    values: dict[int, Any] = {}
    for number, group in enumerate(chain.tied):
        for ref in group:
            name = chain.blocks[ref.block].global_name(ref.name)
            if name in state:
                values[number] = state[name]
    return values


def _local(
    chain: Chain, block: int, module: nn.Module, state: Mapping[str, Any], tied: Mapping[int, Any]
) -> dict[str, Any]:
    """Return the part of `state` that is of a block, by the names that its module has."""
    names = {local: chain.blocks[block].global_name(local) for local in module.state_dict()}
    local = {name: state[known] for name, known in names.items() if known in state}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for number, value in tied.items():
        for ref in chain.tied[number]:
            if ref.block == block:
                local.update((name, value) for name, item in parameters.items() if item is parameters[ref.name])
    return local


def _load(module: nn.Module, local: Mapping[str, Any]) -> None:
    try:
        with torch.no_grad():
            module.load_state_dict(local, strict=False)
    except RuntimeError as error:  # a module of the user's may load in its own way
        raise ModelError(f"a {type(module).__name__} of the chain did not load its state: {error}") from error
