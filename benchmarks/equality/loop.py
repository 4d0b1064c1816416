"""A plain training loop in one process: what a pipeline has to equal, bit for bit.

It shares no code with the project. It knows a user's model as the user wrote it, runs it by its own forward, one
microbatch after another, and adds what docs/contract.md adds: seeds for each block by hooks, the loss of a batch from
those of its microbatches, the order in which gradients of tied weights are summed, the norm, and in an asynchronous
schedule old weights, of which it says which by itself.
"""

from __future__ import annotations

import hashlib
import math
import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Delays", "Fields", "Loop", "Result", "Task", "digest"]

Fields = Mapping[str, Tensor]
Optimizers = Callable[[list[tuple[str, nn.Parameter]]], Sequence[torch.optim.Optimizer]]

LARGE = 32768
MOST_PIECES = 256


@dataclass
class Task:
    """A user's model and loss. Making another one makes the same numbers."""

    model: nn.Module
    blocks: Sequence[nn.Module]
    """Its parts, in the order in which they run: what seeds are for, and between which a pipeline cuts."""
    forward: Callable[[Fields], tuple[Tensor, ...]]
    """Runs the whole model on the fields of a microbatch, and returns what the loss reads."""
    shares: Callable[[tuple[Tensor, ...], Fields, Sequence[float]], list[Tensor]]
    """The loss's parts of one microbatch: sums over targets, divided by how many all microbatches have."""
    count: Callable[[Fields], list[float]]
    """How many targets each part has in some rows."""
    whole: tuple[str, ...] = ()
    """Fields that all microbatches get whole."""
    tied: Sequence[Sequence[str]] = ()
    """Names of parameters that are one weight: each has a gradient of its own here, and all share their memory."""
    ending: nn.Module | None = None
    """A loss with weights, which are called `loss.` and a name."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters by name."""
        own: dict[str, nn.Parameter] = {} if self.ending is None else dict(self.ending.named_parameters())
        return {**dict(self.model.named_parameters()), **{f"loss.{name}": item for name, item in own.items()}}

    def state(self) -> dict[str, Tensor]:
        """Return weights and buffers by name."""
        own = {} if self.ending is None else self.ending.state_dict()
        return {**self.model.state_dict(), **{f"loss.{name}": item for name, item in own.items()}}

    def parts(self) -> Iterator[nn.Module]:
        """Yield every module."""
        yield from self.model.modules()
        if self.ending is not None:
            yield from self.ending.modules()


@dataclass(frozen=True)
class Delays:
    """What an asynchronous schedule delays: by the closed forms of docs/schedules.md, for stages of these blocks."""

    cut: Sequence[int]
    """Blocks per stage."""
    depths: Sequence[int]
    """Forwards that each stage runs ahead of its backwards."""
    per_update: int = 1
    """Microbatches whose gradients make one update."""
    vertical: bool = False
    """Every stage uses the version that the first one has."""
    two_versions: bool = False
    """A gradient is of the version before the newest."""

    def version(self, stage: int, microbatch: int) -> int:
        """Return how many updates the weights have seen that `stage` runs a microbatch on."""
        if self.two_versions:
            return max(microbatch // self.per_update - 1, 0)
        return max(microbatch - self.depths[0 if self.vertical else stage], 0)


@dataclass
class Result:
    """What training gave; for each batch; norms and skipped updates are of each stage in an asynchronous run.

    A batch that ends the training by what is not finite has no losses.
    """

    losses: list[list[float]] = field(default_factory=list)
    norms: list[list[float | None]] = field(default_factory=list)
    skipped: list[list[int]] = field(default_factory=list)
    evaluations: list[list[float]] = field(default_factory=list)
    gradients: dict[str, str] = field(default_factory=dict)
    state: dict[str, str] = field(default_factory=dict)


@dataclass
class _Stage:
    """Weights that are updated together."""

    names: list[str]
    parameters: list[nn.Parameter]
    optimizers: Sequence[torch.optim.Optimizer]
    rates: list[list[float]]
    versions: list[list[Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, named: Mapping[str, nn.Parameter], repeats: set[str], make: Optimizers) -> _Stage:
        trained = {name: item for name, item in named.items() if item.requires_grad}
        stepped = [(name, item) for name, item in trained.items() if name not in repeats]
        optimizers = list(make(stepped)) if stepped else []
        rates = [[float(group["lr"]) for group in item.param_groups] for item in optimizers]
        return cls(list(trained), list(trained.values()), optimizers, rates)


class Loop:
    """Trains a task as a user would write it down.

    `usual_rate` is the optimizer's own rate, of which those of its groups keep their ratio under `learning_rate`.
    """

    def __init__(
        self,
        task: Task,
        optimizers: Optimizers,
        num_microbatches: int,
        *,
        seed: int,
        delays: Delays | None = None,
        clip: float | None = None,
        learning_rate: Callable[[float], float] | None = None,
        skips: bool = False,
        measures: bool = False,
    ) -> None:
        self.task, self.num_microbatches, self.seed = task, num_microbatches, seed
        self.delays, self.clip, self.learning_rate, self.skips = delays, clip, learning_rate, skips
        self.iteration = 0
        self.measures = measures or clip is not None
        self.result = Result()
        self._place = (0, 0)
        self._repeats = {name for group in task.tied for name in group[1:]}
        for group in task.tied:
            _separate(task.model, group)
        named = task.named_parameters()
        cut = [len(task.blocks)] if delays is None else list(delays.cut)
        self._stages = [_Stage.of(held, self._repeats, optimizers) for held in self._held(named, cut)]
        own = [(item.defaults["lr"], group["lr"]) for item in self._all_optimizers() for group in item.param_groups]
        usual = [rate for default, rate in own if default == rate]
        self._usual_rate = max(usual or [rate for _, rate in own], default=0.0)
        for index, block in enumerate(task.blocks):
            if isinstance(block, torch.jit.ScriptModule):  # torch allows no such hook there
                task.blocks[index - 1].register_forward_hook(lambda *_, index=index: self._seed_block(index))
            else:
                block.register_forward_pre_hook(lambda *_, index=index: self._seed_block(index))

    def _held(self, named: Mapping[str, nn.Parameter], cut: Sequence[int]) -> Iterator[dict[str, nn.Parameter]]:
        if len(cut) == 1:
            yield dict(named)
            return
        start = 0
        for size in cut:
            inside = [item for block in self.task.blocks[start : start + size] for item in block.parameters()]
            start += size
            if start == len(self.task.blocks) and self.task.ending is not None:
                inside += list(self.task.ending.parameters())
            identities = set(map(id, inside))
            yield {name: item for name, item in named.items() if id(item) in identities}

    def _all_optimizers(self) -> Iterator[torch.optim.Optimizer]:
        for stage in self._stages:
            yield from stage.optimizers

    def _seed_block(self, block: int) -> None:
        seed = _derive_seed(self.seed, "dropout", *self._place, block)
        torch.manual_seed(seed)
        self._seed_others(block)

    def _seed_others(self, block: int) -> None:
        seed = _derive_seed(self.seed, "dropout", *self._place, block)
        random.seed(seed)
        np.random.seed(seed % (1 << 32))

    def _run(self, fields: Fields, totals: Sequence[float], iteration: int, microbatch: int) -> list[Tensor]:
        self._place = (iteration, microbatch)
        outputs = self.task.forward(fields)
        self._seed_others(len(self.task.blocks))
        return self.task.shares(outputs, fields, totals)

    def _cut(self, batch: Fields, size: int) -> list[Fields]:
        rows = next(len(item) for name, item in batch.items() if name not in self.task.whole)
        whole = self.task.whole
        return [
            {name: item if name in whole else item[start : start + size] for name, item in batch.items()}
            for start in range(0, rows, size)
        ]

    def _totals(self, pieces: Sequence[Fields]) -> list[float]:
        counts = [self.task.count(fields) for fields in pieces]
        return [sum(column) for column in zip(*counts, strict=True)]

    def train(self, batches: Sequence[Fields]) -> None:
        """Train on batches, from an empty pipeline to an empty pipeline."""
        if self.delays is None:
            for batch in batches:
                self._train_synchronously(batch)
        else:
            self._train_delayed(batches, self.delays)

    def _microbatches(self, batch: Fields) -> list[Fields]:
        rows = next(len(item) for name, item in batch.items() if name not in self.task.whole)
        return self._cut(batch, rows // self.num_microbatches)

    def _train_synchronously(self, batch: Fields) -> None:
        pieces = self._microbatches(batch)
        totals, values = self._totals(pieces), []
        for number, fields in enumerate(pieces):
            shares = self._run(fields, totals, self.iteration, number)
            values.append([share.item() for share in shares])
            if (loss := _added(shares)).requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
        parts = [math.fsum(column) for column in zip(*values, strict=True)]
        (stage,) = self._stages
        self._sum_tied()
        norm = self._norm(stage) if self.measures and all(map(math.isfinite, parts)) else None
        applies = all(map(math.isfinite, parts)) and (norm is None or math.isfinite(norm))
        if applies and self.skips:
            applies = all(
                bool(_numbers(item.grad).isfinite().all()) for item in stage.parameters if item.grad is not None
            )
        self._update(stage, norm, applies, self.iteration, self.iteration)
        self._tell(parts, [norm], [int(not applies)])
        self.iteration += 1

    def _tell(self, parts: list[float], norms: list[float | None], skipped: list[int]) -> None:
        is_end = not self.skips and not (all(map(math.isfinite, parts)) and not any(skipped))
        self.result.losses.append([] if is_end else parts)
        self.result.norms.append([] if is_end else norms)
        self.result.skipped.append([] if is_end else skipped)

    def _train_delayed(self, batches: Sequence[Fields], delays: Delays) -> None:
        pieces = [fields for batch in batches for fields in self._microbatches(batch)]
        size, group = self.num_microbatches, delays.per_update
        for stage in self._stages:
            stage.versions = [_copies(stage)]
        values: list[list[float]] = []
        norms: list[float | None] = [None] * len(self._stages)
        skipped = [0] * len(self._stages)
        for serial, fields in enumerate(pieces):
            update = serial // group
            totals = self._totals(pieces[update * group : (update + 1) * group])
            iteration, number = divmod(serial, size)
            with self._on_old_weights(delays, serial):
                shares = self._run(fields, totals, self.iteration + iteration, number)
                values.append([share.item() for share in shares])
                if (loss := _added(shares)).requires_grad:
                    # One, or NaN where the loss is: so every stage sees it in its own gradients.
                    loss.backward(loss.detach() * 0 + 1)  # type: ignore[no-untyped-call]
            if (serial + 1) % group == 0:
                self._sum_tied()
                for index, stage in enumerate(self._stages):
                    norms[index] = norm = self._norm(stage) if self.measures else None
                    finite = [
                        _numbers(item.grad).isfinite().all() for item in stage.parameters if item.grad is not None
                    ]
                    applies = all(map(bool, finite)) and (norm is None or math.isfinite(norm))
                    skipped[index] += not applies
                    progress = self.iteration + update * (group / size)
                    first = (self.iteration * size) // group
                    self._update(stage, norm, applies, progress, first + update)
                    stage.versions.append(_copies(stage))
            if number == size - 1:
                own = values[-size:]
                parts = [math.fsum(column) * (group / size) for column in zip(*own, strict=True)]
                self._tell(parts, list(norms), skipped)
                skipped = [0] * len(self._stages)
        self.iteration += len(batches)

    @contextmanager
    def _on_old_weights(self, delays: Delays, serial: int) -> Iterator[None]:
        newest = [[item.data for item in stage.parameters] for stage in self._stages]
        for index, stage in enumerate(self._stages):
            for item, old in zip(stage.parameters, stage.versions[delays.version(index, serial)], strict=True):
                item.data = old
        yield
        for stage, kept in zip(self._stages, newest, strict=True):
            for item, data in zip(stage.parameters, kept, strict=True):
                item.data = data

    def _sum_tied(self) -> None:
        """Give every use of a weight the sum of the gradients of all, in the order of blocks."""
        named = self.task.named_parameters()
        for group in self.task.tied:
            uses = [named[name] for name in group]
            if all(use.grad is None for use in uses):
                continue
            total = torch.zeros_like(uses[0]) if uses[0].grad is None else uses[0].grad.clone()
            for use in uses[1:]:
                total += torch.zeros_like(use) if use.grad is None else use.grad
            for use in uses:
                use.grad = total.clone()

    def _norm(self, stage: _Stage) -> float:
        pairs = zip(stage.names, stage.parameters, strict=True)
        counted = [item.grad for name, item in pairs if item.grad is not None and name not in self._repeats]
        return math.sqrt(math.fsum(norm * norm for norm in map(_norm_of, counted)))

    def _update(self, stage: _Stage, norm: float | None, applies: bool, progress: float, number: int) -> None:
        if applies and norm is not None and self.clip is not None and self.clip / (norm + 1e-6) < 1.0:
            for item in stage.parameters:
                if item.grad is not None:
                    item.grad.mul_(self.clip / (norm + 1e-6))
        if applies:
            for name, item in zip(stage.names, stage.parameters, strict=True):
                if item.grad is not None:
                    self.result.gradients[f"update {number}: {name}"] = digest(item.grad)
            for optimizer, rates in zip(stage.optimizers, stage.rates, strict=True):
                if self.learning_rate is not None:
                    rate = self.learning_rate(progress)
                    for group, own in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate if own == self._usual_rate else rate * (own / self._usual_rate)
                optimizer.step()
        for parameter in stage.parameters:
            parameter.grad = None

    def evaluate(self, batches: Sequence[Fields], size: int | None) -> None:
        """Compute the held-out loss: of each batch, cut into pieces of so many rows, or as one for training is."""
        modes = [(part, part.training) for part in self.task.parts()]
        for part, _ in modes:
            part.training = False
        values, counts = [], []
        with torch.no_grad():
            number = 0
            for batch in batches:
                rows = next(len(item) for name, item in batch.items() if name not in self.task.whole)
                for fields in self._cut(batch, size or -(-rows // self.num_microbatches)):
                    count = self.task.count(fields)
                    shares = self._run(fields, [1.0] * len(count), number, 0)
                    values.append([share.item() for share in shares])
                    counts.append(count)
                    number += 1
        for part, mode in modes:
            part.training = mode
        pairs = zip(zip(*values, strict=True), zip(*counts, strict=True), strict=True)
        self.result.evaluations.append([math.fsum(column) / math.fsum(count) for column, count in pairs])

    def finish(self) -> Result:
        """Return what was computed."""
        self.result.state = {name: digest(item) for name, item in self.task.state().items()}
        return self.result


def _derive_seed(*parts: int | str) -> int:
    text = repr(parts).encode()
    (number,) = struct.unpack("<Q", hashlib.blake2b(text, digest_size=8).digest())
    return int(number >> 1)


def _separate(model: nn.Module, names: Sequence[str]) -> None:
    """Let every use of a weight have a gradient of its own; the numbers stay in one memory."""
    shared = model.get_parameter(names[0])
    for name in names[1:]:
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, nn.Parameter(shared.data))


def _copies(stage: _Stage) -> list[Tensor]:
    return [item.detach().clone() for item in stage.parameters]


def _added(shares: Sequence[Tensor]) -> Tensor:
    total = shares[0]
    for share in shares[1:]:
        total = total + share
    return total


def _numbers(gradient: Tensor) -> Tensor:
    numbers = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(numbers) if numbers.is_complex() else numbers


def _norm_of(gradient: Tensor) -> float:
    numbers = _numbers(gradient)
    if numbers.numel() <= LARGE:
        return float(torch.linalg.vector_norm(numbers, dtype=torch.float64))
    pieces = numbers.reshape(-1).chunk(min(MOST_PIECES, 1 + numbers.numel() // LARGE))
    return float(
        torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p, dtype=torch.float64) for p in pieces]))
    )


def digest(tensor: Tensor) -> str:
    """Return a fingerprint of the bits of a tensor, its shape and its type."""
    if tensor.is_sparse:
        dense = tensor.detach().coalesce()
        return f"sparse {digest(dense.indices())} {digest(dense.values())} {tuple(tensor.shape)}"
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    code = hashlib.blake2b(plain.numpy().tobytes(), digest_size=8).hexdigest()
    return f"{code} {tuple(tensor.shape)} {tensor.dtype}"
