"""What a pipeline computes, computed in one process: the oracle that `vpipe verify` and the tests compare with.

Plain PyTorch on purpose. It shares the model's definition with the runtime and nothing else, so that a mistake there
cannot hide here. For the same bits, run it with the same number of threads as the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from vpipe.errors import DataError, PlanError, ScheduleError
from vpipe.model.chain import Chain, call_block
from vpipe.model.loss import exact_sum, sum_parts
from vpipe.model.rng import derive_seed, seed_everything, seeded, seeding_others
from vpipe.schedule.weights import StageWeights
from vpipe.verify.gradients import norm_of, sum_gradients

__all__ = ["OptimizerFactory", "Reference", "ReferenceResult"]

OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]]
Fields = Mapping[str, Tensor]


@dataclass(frozen=True)
class ReferenceResult:
    """What the reference computed between two moments at which a pipeline would be empty."""

    losses: tuple[dict[str, float], ...]
    """Per microbatch, its share of each part of the loss of its update; one without samples has none."""
    gradients: tuple[dict[str, Tensor], ...]
    """Per update, the gradients as the optimizers got them (tied ones summed, clipped), by model-wide name; without
    those that were not applied."""
    norms: tuple[tuple[float, ...], ...]
    """Per update, the norms before clipping: one over all stages, or in an asynchronous run one per stage; none of an
    update without samples."""

    def batch_parts(self, num_microbatches: int) -> list[dict[str, float]]:
        """Return each part of the loss per batch: shares add up, and a batch of several updates has their mean."""
        num_batches = len(self.losses) // num_microbatches
        per_batch = len(self.norms) // num_batches
        found = []
        for batch in range(num_batches):
            shares = self.losses[batch * num_microbatches : (batch + 1) * num_microbatches]
            num_updates = sum(map(bool, self.norms[batch * per_batch : (batch + 1) * per_batch]))
            found.append({part: exact_sum(share[part] for share in shares) * (1 / num_updates) for part in shares[0]})
        return found


class _Stage:
    """The parameters of one stage with their optimizer, and a ring of old versions for the forwards that need them."""

    def __init__(self, chain: Chain, modules: Sequence[nn.Module], blocks: range, optimizer: OptimizerFactory) -> None:
        self.blocks = blocks
        self.keys = [
            (block, name) for block in blocks for name, item in modules[block].named_parameters() if item.requires_grad
        ]
        self.names = [chain.blocks[block].global_name(name) for block, name in self.keys]
        self.parameters = [modules[block].get_parameter(name) for block, name in self.keys]
        named = list(zip(self.names, self.parameters, strict=True))
        made = optimizer(named) if named else []
        self.optimizers = [made] if isinstance(made, torch.optim.Optimizer) else list(made)
        self.rates = [[float(group["lr"]) for group in item.param_groups] for item in self.optimizers]
        self.ring: dict[int, list[Tensor]] = {}
        self.newest = 0

    def start(self) -> None:
        """Begin to count versions from the weights as they are now."""
        self.newest = -1
        self.ring = {}
        self.remember()

    def remember(self) -> None:
        """Copy the newest weights into the ring: the optimizer writes into the originals, which no graph refers to."""
        self.newest += 1
        self.ring[self.newest] = [parameter.detach().clone() for parameter in self.parameters]

    def forget(self, still_used: Sequence[int]) -> None:
        """Drop old versions that no later microbatch uses."""
        self.ring = {version: item for version, item in self.ring.items() if version in {self.newest, *still_used}}

    def step(self, learning_rate: float | None, usual: float, *, apply: bool) -> dict[str, Tensor]:
        """Update the weights and return the gradients that this took."""
        pairs = zip(self.names, self.parameters, strict=True)
        gradients = {name: parameter.grad for name, parameter in pairs if parameter.grad is not None}
        for item, rates in zip(self.optimizers, self.rates, strict=True) if apply else ():
            if learning_rate is not None:
                for group, own in zip(item.param_groups, rates, strict=True):
                    group["lr"] = learning_rate if own == usual or not usual else learning_rate * (own / usual)
            item.step()
        for parameter in self.parameters:
            parameter.grad = None
        return gradients


class Reference:
    """Trains a chain in one process, with the arithmetic that a pipeline must reproduce bit for bit.

    Args:
        chain: the model with its loss.
        optimizer: makes the optimizer of one stage from its (name, parameter) pairs.
        partition: blocks per stage; without it there is one stage.
        seed: for initial weights and dropout.
        clip_grad_norm: largest gradient norm: of all gradients, or in asynchronous training of each stage's.
        learning_rate: the rate as a function of iterations done, instead of the optimizer's own.
        device: where to compute.
        keep_gradients: return the gradients of every update; long asynchronous runs are better off without.

    Raises:
        PlanError: the partition does not fit the chain.
    """

    def __init__(
        self,
        chain: Chain,
        optimizer: OptimizerFactory,
        *,
        partition: Sequence[int] | None = None,
        seed: int = 0,
        clip_grad_norm: float | None = None,
        learning_rate: Callable[[float], float] | None = None,
        device: torch.device | str = "cpu",
        keep_gradients: bool = True,
    ) -> None:
        sizes = [len(chain)] if partition is None else list(partition)
        if sum(sizes) != len(chain) or min(sizes) < 1:
            raise PlanError(f"partition {sizes} has {sum(sizes)} blocks in all, but the model has {len(chain)}")
        self.chain = chain
        self.iteration = 0
        self._seed = seed
        self._clip = clip_grad_norm
        self._learning_rate = learning_rate
        self._device = torch.device(device)
        self._keep_gradients = keep_gradients
        self._modules = [chain.materialise(block, seed, device) for block in range(len(chain))]
        ends = list(accumulate(sizes))
        ranges = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self._stages = [_Stage(chain, self._modules, blocks, optimizer) for blocks in ranges]
        # The learning rate stands for that of an optimizer, or where all groups have their own for the largest.
        made = [item for stage in self._stages for item in stage.optimizers]
        rates = [(item.defaults["lr"], group["lr"]) for item in made for group in item.param_groups]
        self._usual_rate = float(
            max((usual for usual, own in rates if usual == own), default=max((own for _, own in rates), default=0.0))
        )

    def parameters(self) -> dict[str, Tensor]:
        """Return a copy of all parameters by model-wide name."""
        return self._named(lambda module: dict(module.named_parameters()))

    def buffers(self) -> dict[str, Tensor]:
        """Return a copy of all buffers by model-wide name."""
        return self._named(lambda module: dict(module.named_buffers()))

    def _named(self, select: Callable[[nn.Module], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            block.global_name(name): tensor.detach().clone()
            for block, module in zip(self.chain.blocks, self._modules, strict=True)
            for name, tensor in select(module).items()
        }

    def train_batch(self, microbatches: Sequence[Fields]) -> ReferenceResult:
        """Train synchronously on one batch, given as its microbatches: accumulate all gradients, update once."""
        losses = []
        totals = self._totals(microbatches)
        with seeded(0):
            for index, fields in enumerate(microbatches):
                if not self._num_samples(fields):
                    losses.append(self._no_loss())
                    continue
                parts = self._loss(fields, totals, self.iteration, index)
                if (total := sum_parts(parts)).requires_grad:
                    total.backward()  # type: ignore[no-untyped-call]
                losses.append({name: part.item() for name, part in parts.items()})
        norm = self._finish_gradients(self._stages)
        gradients: dict[str, Tensor] = {}
        is_finite = math.isfinite(norm) and all(math.isfinite(part) for share in losses for part in share.values())
        for stage in self._stages:
            gradients.update(self._step(stage, self.iteration, apply=is_finite))
        self.iteration += 1
        return ReferenceResult(tuple(losses), (gradients,), ((norm,),))

    def train_asynchronous(
        self, microbatches: Sequence[Fields], usage: Sequence[StageWeights], num_microbatches: int
    ) -> ReferenceResult:
        """Train with the delays of an asynchronous schedule from an empty pipeline to an empty pipeline.

        Microbatches are taken in order. Each stage runs microbatch k on the version that `usage` names, and updates
        from its newest weights once the last gradient of the update is there. `num_microbatches` are one iteration.

        Raises:
            DataError: the microbatches are not those of the schedule, or no whole number of iterations.
            PlanError: a weight is tied across stages, which update at different times.
            ScheduleError: a stage's updates are not in order, or a version is needed before it was made.
        """
        self._check_asynchronous(microbatches, usage, num_microbatches)
        update_of = usage[-1].update_of
        groups: list[list[Fields]] = [[] for _ in range(update_of[-1] + 1)]
        for update, fields in zip(update_of, microbatches, strict=True):
            groups[update].append(fields)
        share = len(groups[0]) / num_microbatches
        losses: list[dict[str, float]] = []
        gradients: list[dict[str, Tensor]] = [{} for _ in groups]
        norms: list[list[float]] = [[] for _ in groups]
        for stage in self._stages:
            stage.start()
        for serial, fields in enumerate(microbatches):
            losses.append(
                self._stale_gradients(serial, fields, self._totals(groups[update_of[serial]]), usage, num_microbatches)
            )
            for stage, weights in zip(self._stages, usage, strict=True):
                update = weights.update_of[serial]
                if serial + 1 < len(microbatches) and weights.update_of[serial + 1] == update:
                    continue
                if any(map(self._num_samples, groups[update])):
                    norms[update].append(norm := self._finish_gradients([stage]))
                    # The very arithmetic of the rate's argument is part of the contract.
                    progress = self.iteration + update * share
                    gradients[update].update(self._step(stage, progress, apply=math.isfinite(norm)))
                stage.remember()
                stage.forget(weights.version_of[serial + 1 :])
        self.iteration += len(microbatches) // num_microbatches
        return ReferenceResult(tuple(losses), tuple(gradients), tuple(map(tuple, norms)))

    def _check_asynchronous(
        self, microbatches: Sequence[Fields], usage: Sequence[StageWeights], num_microbatches: int
    ) -> None:
        if len(usage) != len(self._stages):
            raise ScheduleError(f"the schedule has {len(usage)} stages but the partition has {len(self._stages)}")
        planned = {len(weights.version_of) for weights in usage}
        if planned != {len(microbatches)} or len(microbatches) % num_microbatches:
            raise DataError(
                f"got {len(microbatches)} microbatches; the schedule has {sorted(planned)} and an iteration "
                f"{num_microbatches}: give all of the schedule's, a whole number of iterations"
            )
        for index, weights in enumerate(usage):
            if sorted(weights.update_of) != list(weights.update_of):
                raise ScheduleError(f"stage {index} applies gradients out of order: updates {weights.update_of}")
        for group in self.chain.tied:
            stages = {index for ref in group for index, stage in enumerate(self._stages) if ref.block in stage.blocks}
            if len(stages) > 1:
                names = " and ".join(self.chain.blocks[ref.block].global_name(ref.name) for ref in group)
                raise PlanError(
                    f"{names} are one weight on stages {sorted(stages)}, which an asynchronous schedule updates at "
                    "different times; untie them, cut so that one stage holds them, or use a synchronous schedule"
                )

    def _stale_gradients(
        self,
        serial: int,
        fields: Fields,
        totals: Mapping[str, float],
        usage: Sequence[StageWeights],
        num_microbatches: int,
    ) -> dict[str, float]:
        """Run a microbatch forward and backward on the versions it uses; add to the gradients of the newest weights."""
        if not self._num_samples(fields):
            return self._no_loss()
        used = []
        for index, (stage, weights) in enumerate(zip(self._stages, usage, strict=True)):
            version = weights.version_of[serial]
            if version not in stage.ring:
                raise ScheduleError(
                    f"microbatch {serial} needs weight version {version} of stage {index}, which has made "
                    f"{stage.newest} updates by then"
                )
            used += stage.ring[version]
        iteration, index = divmod(serial, num_microbatches)
        with self._holding(used), seeded(0):
            parts = self._loss(fields, totals, self.iteration + iteration, index)
            if (total := sum_parts(parts)).requires_grad:
                total.backward(total.detach() * 0 + 1)  # type: ignore[no-untyped-call]
        return {name: part.item() for name, part in parts.items()}

    @contextmanager
    def _holding(self, version: Sequence[Tensor]) -> Iterator[None]:
        """Let the parameters have the numbers of an older version: whatever a backward reads is of that, too."""
        parameters = [parameter for stage in self._stages for parameter in stage.parameters]
        newest = [parameter.data for parameter in parameters]
        for parameter, old in zip(parameters, version, strict=True):
            parameter.data = old
        try:
            yield
        finally:
            for parameter, data in zip(parameters, newest, strict=True):
                parameter.data = data

    def evaluate(self, pieces: Sequence[Fields]) -> dict[str, float]:
        """Return the loss and its parts over held-out microbatches, with dropout off."""
        modes = [(part, part.training) for module in self._modules for part in module.modules()]
        shares: list[dict[str, float]] = []
        for part, _ in modes:
            part.training = False
        # Those that have a switch of their own do more than to note the mode.
        told = [(part, mode) for part, mode in modes if not _notes_only(part)]
        for part, _ in told:
            part.eval()
        with torch.no_grad(), seeded(0):
            for number, fields in enumerate(pieces):
                parts = self._loss(fields, dict.fromkeys(self.chain.loss.parts, 1.0), number, 0)
                shares.append({name: item.item() for name, item in parts.items()})
        for part, mode in told:
            part.train(mode)
        for part, mode in modes:
            part.training = mode
        counts = [self._totals([fields]) for fields in pieces]
        means = {
            name: exact_sum(share[name] for share in shares) / exact_sum(count[name] for count in counts)
            for name in self.chain.loss.parts
        }
        return {"loss": exact_sum(means.values()), **means}

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return what the optimizers keep for each parameter, by its model-wide name."""
        return {
            f"{name}: {key}": torch.as_tensor(value)
            for stage in self._stages
            for name, parameter in zip(stage.names, stage.parameters, strict=True)
            for optimizer in stage.optimizers
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor | int | float)
        }

    def _loss(
        self,
        fields: Fields,
        totals: Mapping[str, float],
        iteration: int,
        microbatch: int,
    ) -> dict[str, Tensor]:
        values = {name: tensor.to(self._device) for name, tensor in fields.items()}
        for index, (block, module) in enumerate(zip(self.chain.blocks, self._modules, strict=True)):
            seed = derive_seed(self._seed, "dropout", iteration, microbatch, index)
            seed_everything(seed)
            with seeding_others(seed):
                values.update(call_block(block, module, values))
        with seeding_others(derive_seed(self._seed, "dropout", iteration, microbatch, len(self._modules))):
            return self.chain.loss(values, totals, self._num_samples(fields))

    def _no_loss(self) -> dict[str, float]:
        return dict.fromkeys(self.chain.loss.parts, 0.0)

    def _num_samples(self, fields: Fields) -> int:
        return next(len(item) for name, item in fields.items() if name not in self.chain.whole_fields)

    def _totals(self, microbatches: Sequence[Fields]) -> dict[str, float]:
        totals: dict[str, float] = {}
        for fields in filter(self._num_samples, microbatches):
            for name, count in self.chain.loss.count(fields, self._num_samples(fields)).items():
                totals[name] = totals.get(name, 0.0) + count
        return totals

    def _step(self, stage: _Stage, progress: float, *, apply: bool) -> dict[str, Tensor]:
        """Update, but with what is not finite, which a pipeline does not apply."""
        rate = None if self._learning_rate is None else self._learning_rate(progress)
        gradients = stage.step(rate, self._usual_rate, apply=apply)
        return gradients if self._keep_gradients and apply else {}

    def _finish_gradients(self, stages: Sequence[_Stage]) -> float:
        """Sum the gradients of tied weights, clip, and return the norm before clipping."""
        held = {key: item for stage in stages for key, item in zip(stage.keys, stage.parameters, strict=True)}
        counted = dict(held)
        for group in self.chain.tied:
            copies = [held[ref.block, ref.name] for ref in group if (ref.block, ref.name) in held]
            if copies:
                sum_gradients(copies)
            for ref in group[1:]:
                counted.pop((ref.block, ref.name), None)
        gradients = [item.grad for item in counted.values() if item.grad is not None]
        norms = [norm_of(item) for item in gradients]
        norm = math.sqrt(math.fsum(each * each for each in norms))  # `** 2` may round in another way
        if self._clip is not None and self._clip / (norm + 1e-6) < 1.0:
            for item in held.values():
                if item.grad is not None:
                    item.grad.mul_(self._clip / (norm + 1e-6))
        return norm


def _notes_only(part: nn.Module) -> bool:
    return type(part).train is nn.Module.train and type(part).eval is nn.Module.eval
