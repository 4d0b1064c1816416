"""Measure what a run's model costs on this machine: the planner's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from vpipe.config import RunConfig
from vpipe.data.progress import Progress, no_progress
from vpipe.errors import PlanError
from vpipe.model.rng import seeded
from vpipe.plan.profile import BlockProfile, Profile, SizeProfile
from vpipe.train.profiling.alike import block_signature, describe_machine, profile_fingerprint
from vpipe.train.profiling.footprint import measure_footprint
from vpipe.train.profiling.times import summarise_times, take_rounds, take_steps
from vpipe.train.profiling.trial import Sample, make_trial
from vpipe.train.setup import Setup, build_setup
from vpipe.train.trainer import default_device

__all__ = ["profile_config"]

_BUDGET_MS = 1500.0
"""How long one block is measured, if a few rounds do not take longer than that."""


def profile_config(
    config: RunConfig, *, microbatch_sizes: Sequence[int] | None = None, progress: Progress = no_progress
) -> Profile:
    """Measure the run's model for microbatches of some sizes; None: of the run's own.

    One block is in memory at a time. Blocks that are alike are measured once.

    Raises:
        PlanError: a size is not one of a microbatch of the run's batch.
        ConfigError, DataError, ModelError: the run cannot be set up.
    """
    setup = build_setup(config)
    device = torch.device(default_device() if config.launch.device == "auto" else config.launch.device)
    sizes = _sizes(config, microbatch_sizes)
    with seeded(config.seed):
        measured = tuple(_Size(setup, size, device, progress).measure() for size in sizes)
    num_threads = torch.get_num_threads()
    return Profile(
        profile_fingerprint(setup, sizes, device, num_threads),
        describe_machine(config, device, num_threads),
        measured,
    )


def _sizes(config: RunConfig, asked: Sequence[int] | None) -> tuple[int, ...]:
    sizes = (config.microbatch_size,) if asked is None else tuple(sorted(set(asked)))
    if bad := [size for size in sizes if not 1 <= size <= config.train.batch_size]:
        raise PlanError(f"microbatches of {bad[0]} samples do not fit train.batch_size {config.train.batch_size}")
    return sizes


class _Size:
    """The blocks of a chain for microbatches of one size, measured in order."""

    def __init__(self, setup: Setup, size: int, device: torch.device, progress: Progress) -> None:
        self._setup, self._size, self._device, self._progress = setup, size, device, progress
        (batch,) = setup.batches(setup.chain.fields, 0, 1)
        moved = {name: tensor.to(device) for name, tensor in batch.fields.items()}
        totals = setup.chain.loss.count(moved, batch.num_samples)
        self._sample = Sample({name: tensor[:size] for name, tensor in moved.items()}, size, totals)
        self._specs = setup.chain.infer(range(len(setup.chain)), self._sample.fields)

    def measure(self) -> SizeProfile:
        """Measure every kind of block once."""
        chain = self._setup.chain
        signatures = [block_signature(chain, index, self._specs) for index in range(len(chain))]
        num_kinds = len(set(signatures))
        known: dict[str, tuple[BlockProfile, list[Tensor | None]]] = {}
        values: dict[str, Tensor] = {}
        blocks = []
        for block, index, signature in zip(chain.blocks, range(len(chain)), signatures, strict=True):
            if signature not in known:
                self._progress(f"measuring {len(chain)} blocks, microbatches of {self._size}", len(known), num_kinds)
                known[signature] = self._measure(index, values)
            found, written = known[signature]
            blocks.append(replace(found, name=block.name))
            pairs = zip(block.outputs, written, strict=True)
            values |= {name: value for name, value in pairs if value is not None}
            values = {spec.name: values[spec.name] for spec in self._specs.get(index + 1, ())}
        self._progress(f"measuring {len(chain)} blocks, microbatches of {self._size}", num_kinds, num_kinds)
        return SizeProfile(self._size, tuple(blocks))

    def _measure(self, index: int, values: Mapping[str, Tensor]) -> tuple[BlockProfile, list[Tensor | None]]:
        """Return what block `index` costs, and of what it writes that which crosses the cut after it."""
        setup = self._setup
        trial = make_trial(
            setup.chain, index, self._specs, values, self._sample, setup.optimizer,
            seed=setup.config.seed, device=self._device,
        )  # fmt: skip
        block = setup.chain.blocks[index]
        footprint = measure_footprint(trial)
        timings = take_rounds(trial, self._device, lambda ms: ms, _BUDGET_MS)
        timings |= take_steps(trial, self._device)
        times = summarise_times([timings])
        written = trial.forward(trial.stage().stage, split=False)
        found = BlockProfile(
            name=block.name, optimizer_bytes=trial.optimizer_bytes, **asdict(footprint), **asdict(times)
        )
        return found, [None if trial.is_last else written.get(name) for name in block.outputs]
