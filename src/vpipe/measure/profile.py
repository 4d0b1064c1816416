"""Measure what a run's model costs on the ranks that will train it: the planner's input.

All ranks measure the same block at the same time, so that they contend for the machine as they do in the run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch

from vpipe.config import RunConfig, read_config
from vpipe.data.progress import Progress, no_progress
from vpipe.errors import PlanError
from vpipe.measure.alike import describe_machine, describe_model, profile_fingerprint
from vpipe.measure.blocks import (
    host_share,
    measure_size,
    rank_speeds,
    size_profile,
    stage_overhead_ms,
)
from vpipe.measure.cache import cache_words, read_cached, write_cached
from vpipe.measure.copies import Copier
from vpipe.measure.gather import gather
from vpipe.measure.links import measure_host_link, measure_runtime
from vpipe.planner.profile.profile import Profile, write_profile
from vpipe.report.metrics import MetricsWriter
from vpipe.runtime.comm.joining import use_device
from vpipe.runtime.comm.world import World
from vpipe.runtime.memory.allocator import keep_freed_memory
from vpipe.workload.device import device_of, join_world
from vpipe.workload.setup import Setup, build_setup

__all__ = ["find_profile", "obtain_profile", "profile_config", "profile_ranks"]

_LOGGER = logging.getLogger(__name__)
_HOST_STEP = "measuring copies"
_RUNTIME_STEP = "measuring links"


def profile_config(
    config: RunConfig, *, microbatch_sizes: Sequence[int] | None = None, progress: Progress = no_progress
) -> Profile:
    """Measure the run's model on the ranks of the run, of which this is one; collective, without the cache.

    Args:
        config: the run.
        microbatch_sizes: samples in a microbatch; None: the run's own.
        progress: is told how it gets on.

    Raises:
        PlanError: a size is not one of a microbatch of the run's batch.
        ConfigError, DataError, ModelError: the run cannot be set up.
    """
    with join_world(config) as world:
        return _measure(build_setup(config), _sizes(config, microbatch_sizes), world, progress)


def find_profile(config: RunConfig, microbatch_sizes: Sequence[int] | None, num_threads: int) -> Profile | None:
    """Return the profile that was measured before for ranks of so many threads; None where there is none.

    Raises:
        PlanError, ConfigError, DataError, ModelError: as in `profile_config`.
    """
    sizes = _sizes(config, microbatch_sizes)
    device = use_device(torch.device(device_of(config)))
    return read_cached(profile_fingerprint(build_setup(config), sizes, device, num_threads))


def obtain_profile(setup: Setup, microbatch_sizes: Sequence[int] | None, world: World, progress: Progress) -> Profile:
    """Return the cached profile, or measure it and keep it; collective.

    Raises:
        PlanError: a size is not one of a microbatch of the run's batch.
    """
    sizes = _sizes(setup.config, microbatch_sizes)
    fingerprint = profile_fingerprint(setup, sizes, world.device, torch.get_num_threads())
    cached = read_cached(fingerprint) if world.rank == 0 else None
    # Other machines have caches of their own.
    (found, *_) = gather(None if cached is None else cached.to_json(), world)
    if found is not None:
        if world.rank == 0:
            _LOGGER.info("Profile: %s", cache_words(fingerprint))
        return Profile.from_json(found)
    profile = _measure(setup, sizes, world, progress)
    if world.rank == 0:
        write_cached(profile)
    return profile


def profile_ranks(arguments: Sequence[str]) -> None:
    """Be one of the ranks that measure; the profile is kept in the cache.

    `arguments` are the file to write it to, the one for progress, sizes in JSON, and the run's file.
    """
    output, progress, sizes, path = arguments
    config = read_config(path).config
    with join_world(config) as world:
        setup = build_setup(config)
        with MetricsWriter(Path(progress)) as writer:
            tell = partial(_tell, writer) if world.rank == 0 else no_progress
            profile = _measure(setup, _sizes(config, json.loads(sizes)), world, tell)
        if world.rank == 0:
            write_cached(profile)
            write_profile(profile, Path(output))


def _tell(writer: MetricsWriter, step: str, done: int, total: int) -> None:
    writer.write({"step": step, "done": done, "total": total})


def _sizes(config: RunConfig, asked: Sequence[int] | None) -> tuple[int, ...]:
    sizes = (config.microbatch_size,) if asked is None else tuple(sorted(set(asked)))
    if bad := [size for size in sizes if not 1 <= size <= config.train.batch_size]:
        raise PlanError(f"microbatches of {bad[0]} samples do not fit train.batch_size {config.train.batch_size}")
    return sizes


def _measure(setup: Setup, sizes: Sequence[int], world: World, progress: Progress) -> Profile:
    keep_freed_memory()
    progress(_HOST_STEP, 0, 1)
    directory = setup.config.plan.swap_directory
    host = measure_host_link(world, directory)
    progress(_HOST_STEP, 1, 1)
    with nullcontext() if host is None else closing(Copier(world.device, host, directory)) as copier:
        measured = [measure_size(setup, size, world, progress, copier) for size in sizes]
    speeds = rank_speeds(measured[-1])
    profiles = tuple(size_profile(each, speeds) for each in measured)
    crossing = [block.output_bytes for block in profiles[-1].blocks[:-1]]
    progress(_RUNTIME_STEP, 0, 1)
    runtime = measure_runtime(setup.config.launch, int(median(crossing or [0])), world)
    progress(_RUNTIME_STEP, 1, 1)
    num_threads = torch.get_num_threads()
    return Profile(
        profile_fingerprint(setup, sizes, world.device, num_threads),
        describe_machine(setup.config, world.device, num_threads),
        profiles,
        link=runtime.link,
        host=host,
        host_share=host_share(measured[-1]),
        dispatch_ms=runtime.dispatch_ms + stage_overhead_ms(measured[-1]),
        rank_speeds=speeds,
        made_of=describe_model(setup),
    )
