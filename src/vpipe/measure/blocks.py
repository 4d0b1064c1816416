"""The blocks of a chain measured in order, each kind once, by all ranks at once and with few blocks in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor

from vpipe.data.progress import Progress
from vpipe.measure.alike import block_signature
from vpipe.measure.copies import Copier
from vpipe.measure.footprint import measure_footprint
from vpipe.measure.gather import gather, slowest
from vpipe.measure.times import (
    Timings,
    copying_share,
    summarise_times,
    take_beside,
    take_rounds,
    take_steps,
)
from vpipe.measure.trial import Sample, make_trial
from vpipe.model.block import parts_of
from vpipe.model.chain import ValueSpec
from vpipe.model.rng import seeded
from vpipe.planner.profile.profile import BlockProfile, SizeProfile
from vpipe.runtime.comm.world import World
from vpipe.workload.setup import Setup

__all__ = ["MeasuredSize", "host_share", "measure_size", "rank_speeds", "size_profile", "stage_overhead_ms"]

_BUDGET_MS = 1500.0
"""How long one block is measured, if a few rounds do not take longer than that."""
_COPYING_BUDGET_MS = 600.0
"""Likewise with something copied beside it."""
_TOUCHED_BYTES = 32 << 20
"""What the copies of a block touch together: more than the caches that a core has for itself."""
_EMPTY = ("empty_forward", "empty_backward")
_UNEQUAL = 1.5
"""Ranks whose speeds differ by less than this are the same device, on a machine that others use as well."""


@dataclass(frozen=True)
class _Kind:
    """Blocks that are alike: what they hold, what they write, and how long this rank took."""

    footprint: Mapping[str, int]
    timings: Timings
    written: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class MeasuredSize:
    """All blocks for microbatches of one size."""

    microbatch_size: int
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    """Of every block."""
    footprints: Mapping[str, Mapping[str, int]]
    """By kind."""
    timings: tuple[Mapping[str, Timings], ...]
    """Of every rank, by kind."""


def measure_size(
    setup: Setup, size: int, world: World, progress: Progress, copier: Copier | None = None
) -> MeasuredSize:
    """Measure every kind of block for microbatches of `size` samples, also beside copies by `copier`; collective."""
    chain = setup.chain
    sample = _sample(setup, size, world.device)
    specs = chain.infer(range(len(chain)), sample.fields)
    signatures = [block_signature(chain, index, specs) for index in range(len(chain))]
    step, num_kinds = f"measuring blocks, microbatches of {size}", len(set(signatures))
    known: dict[str, _Kind] = {}
    values: dict[str, Tensor] = {}
    with seeded(setup.config.seed):
        for index, signature in enumerate(signatures):
            if signature not in known:
                progress(step, len(known), num_kinds)
                known[signature] = _measure(
                    setup, index, specs, values, sample, world, copier, signatures.count(signature)
                )
            names = parts_of(specs.get(index + 1, ()), chain.blocks[index].outputs)
            pairs = zip(names, known[signature].written, strict=True)
            values |= {name: value for name, value in pairs if value is not None}
            values = {spec.name: values[spec.name] for spec in specs.get(index + 1, ())}
    progress(step, num_kinds, num_kinds)
    return MeasuredSize(
        size,
        tuple(block.name for block in chain.blocks),
        tuple(signatures),
        {signature: kind.footprint for signature, kind in known.items()},
        tuple(gather({signature: kind.timings for signature, kind in known.items()}, world)),
    )


def _sample(setup: Setup, size: int, device: torch.device) -> Sample:
    (batch,) = setup.batches(setup.chain.fields, 0, 1)
    fields = {name: tensor.to(device) for name, tensor in batch.fields.items()}
    totals = setup.chain.loss.count(fields, batch.num_samples)
    return Sample({name: tensor[:size] for name, tensor in fields.items()}, size, totals)


def _measure(
    setup: Setup,
    index: int,
    specs: Mapping[int, tuple[ValueSpec, ...]],
    values: Mapping[str, Tensor],
    sample: Sample,
    world: World,
    copier: Copier | None,
    num_alike: int,
) -> _Kind:
    """Measure one block, of which the chain has `num_alike`."""
    make = partial(
        make_trial,
        setup.chain,
        index,
        specs,
        values,
        sample,
        setup.optimizer,
        seed=setup.config.seed,
        device=world.device,
    )
    trial = make()
    footprint = asdict(measure_footprint(trial))
    copies = [trial, *(make() for _ in range(_num_copies(footprint, num_alike) - 1))]
    agree = partial(slowest, world=world)
    timings = take_rounds(copies, world.device, agree, _BUDGET_MS)
    if copier is not None:
        timings |= take_beside(copies, world.device, agree, copier, _COPYING_BUDGET_MS)
    timings |= take_steps(trial, world.device)
    written = trial.forward(trial.stage().stage)
    names = parts_of(specs.get(index + 1, ()), setup.chain.blocks[index].outputs)
    return _Kind(
        {**footprint, "optimizer_bytes": trial.optimizer_bytes},
        timings,
        tuple(None if trial.is_last else written.get(name) for name in names),
    )


def _num_copies(footprint: Mapping[str, int], num_alike: int) -> int:
    """Return how many blocks stand in for a stage: as many as there are of the kind, if they are not large."""
    touched = 2 * footprint["parameter_bytes"] + footprint["activation_bytes"]
    return min(num_alike, 1 + _TOUCHED_BYTES // max(1, touched))


def rank_speeds(measured: MeasuredSize) -> tuple[float, ...]:
    """Return how fast each rank is, relative to the mean; empty where they are the same device."""
    busy = [
        sum(median(timings["forward"]) + median(timings["backward"]) for timings in kinds.values())
        for kinds in measured.timings
    ]
    if max(busy) < _UNEQUAL * min(busy):
        return ()
    mean = sum(busy) / len(busy)
    return tuple(mean / time for time in busy)


def stage_overhead_ms(measured: MeasuredSize) -> float:
    """Return what a forward or backward of a stage takes besides that of its blocks."""
    taken = [rank[kind] for rank in measured.timings for kind in measured.footprints]
    return median(time for timings in taken for name in _EMPTY for time in timings[name])


def host_share(measured: MeasuredSize) -> float:
    """Return which share of the time of a copy to host memory the computations beside it lose."""
    kinds = [copying_share(rank[kind] for rank in measured.timings) for kind in measured.footprints]
    lost, copied = (sum(times) for times in zip(*kinds, strict=True))
    return max(0.0, lost / copied) if copied else 0.0


def size_profile(measured: MeasuredSize, speeds: tuple[float, ...]) -> SizeProfile:
    """Put together what all ranks measured, as it is on a rank of speed 1."""
    found = {}
    for kind, footprint in measured.footprints.items():
        pairs = zip(measured.timings, speeds or (1.0,) * len(measured.timings), strict=True)
        own = [{name: [time * speed for time in times] for name, times in rank[kind].items()} for rank, speed in pairs]
        found[kind] = BlockProfile("", **footprint, **asdict(summarise_times(own)))
    named = zip(measured.names, measured.kinds, strict=True)
    return SizeProfile(measured.microbatch_size, tuple(replace(found[kind], name=name) for name, kind in named))
