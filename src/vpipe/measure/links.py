"""What messages and the executor cost: a short run of the real runtime, on all ranks at once, with blocks that sleep.

Blocks that sleep leave waiting and work apart: what a rank takes besides its sleep is the runtime's, and what passes
between a send and the end of a receive that waits is the link's.
"""

from __future__ import annotations

import errno
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor

from vpipe.config import LaunchConfig
from vpipe.errors import PlanError
from vpipe.measure.gather import gather
from vpipe.model.emulated import build_emulated_chain
from vpipe.plan.plan import Plan
from vpipe.planner.profile.profile import LinkProfile
from vpipe.report.measured_costs import MeasuredCosts, measure_costs
from vpipe.runtime.comm.world import World
from vpipe.runtime.hooks import Hooks
from vpipe.runtime.pipeline import Pipeline
from vpipe.runtime.trace import TraceRecorder
from vpipe.schedule.action import Action, Kind
from vpipe.workload.slow_links import slow_down

__all__ = ["RuntimeCosts", "measure_host_link", "measure_runtime"]

_SLEEP_MS = 1.0
_NUM_BATCHES = 12
"""Of which the first, in which ranks connect, is left out."""
_SMALL_WIDTH = 64
_FLOAT_BYTES = 4
_HOST_BYTES = 64 << 20
_HOST_REPEATS = 3


@dataclass(frozen=True)
class RuntimeCosts:
    """What comes on top of the blocks' work."""

    link: LinkProfile
    dispatch_ms: float
    """Of each computation: getting from one action to the next, and its share of sending and taking messages."""


def measure_runtime(launch: LaunchConfig, message_bytes: int, world: World) -> RuntimeCosts:
    """Measure messages of about `message_bytes` and small ones between neighbouring ranks; collective."""
    widths = _SMALL_WIDTH, max(4 * _SMALL_WIDTH, message_bytes // _FLOAT_BYTES)
    small, large = (_run(launch, width, world) for width in widths)
    extra = small.overheads
    if world.num_ranks == 1:
        return RuntimeCosts(LinkProfile(), extra.gap_ms)
    # A stage in the middle receives and sends once for each computation, the first and the last one half as often.
    crossing = (world.num_ranks - 1) / world.num_ranks
    dispatch_ms = extra.gap_ms + crossing * (extra.send_ms + extra.receive_ms + 2 * extra.gap_ms)
    latency_ms, longer_ms = (_way_ms(costs, width) for costs, width in zip((small, large), widths, strict=True))
    more_ms = longer_ms - latency_ms + large.overheads.send_ms - extra.send_ms
    more_bytes = (widths[1] - widths[0]) * _FLOAT_BYTES
    return RuntimeCosts(LinkProfile(latency_ms, more_bytes / more_ms if more_ms > 0 else None), dispatch_ms)


def _way_ms(costs: MeasuredCosts, width: int) -> float:
    """Return how long a message of `width` numbers is under way."""
    times = [link.latency + width * _FLOAT_BYTES / link.bandwidth for link in costs.links.values()]
    return fmean(times) if times else math.nan


def _run(launch: LaunchConfig, width: int, world: World) -> MeasuredCosts:
    count = 2 * world.num_ranks
    recorder = TraceRecorder(world.rank, count, lambda: pipeline.iteration)
    pipeline = Pipeline(
        build_emulated_chain(world.num_ranks, _SLEEP_MS, _SLEEP_MS, width),
        optimizer=partial(torch.optim.SGD, lr=1e-6),
        plan=Plan("1f1b", num_microbatches=count),
        world=world,
        hooks=Hooks(record=recorder, waited=recorder.waited),
    )
    slow_down(pipeline, launch)
    batch = {"input": torch.ones(count, width), "target": torch.ones(count, width)}
    for _ in pipeline.train([batch] * _NUM_BATCHES):
        pass
    events = [event for rank in gather(recorder.events(), world) for event in rank if event.iteration]
    kinds = (Kind.SEND_F, Kind.SEND_B)
    sends = {Action(stage, kind, 0): width * _FLOAT_BYTES for stage in range(world.num_ranks) for kind in kinds}
    return measure_costs(events, sends)


def measure_host_link(world: World, directory: Path | None) -> LinkProfile | None:
    """Measure copies to where swapped activations go and back, on all ranks at once; None where there is no room.

    That is pinned memory for a GPU, and a memory-mapped file in `directory` for a CPU, by default where temporary files
    are. Collective.

    Raises:
        PlanError: the directory is not there, or cannot be written to.
    """
    rates = gather(_copy_rate(world.device, directory), world)
    return LinkProfile(0.0, median(rates)) if all(rates) else None


def _copy_rate(device: torch.device, directory: Path | None) -> float:
    """Return bytes per ms, the mean of both directions; 0 where there is no room."""
    value = torch.ones(_HOST_BYTES, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        return _HOST_BYTES / _copy_ms(value, torch.empty(_HOST_BYTES, dtype=torch.uint8, pin_memory=True))
    try:
        with tempfile.NamedTemporaryFile(prefix="vpipe_host_", dir=directory) as file:
            file.write(bytes(_HOST_BYTES))
            file.flush()
            mapped = torch.from_file(file.name, shared=True, size=_HOST_BYTES, dtype=torch.uint8)
            return _HOST_BYTES / _copy_ms(value, mapped)
    except OSError as error:
        if directory is None or error.errno == errno.ENOSPC:
            return 0.0
        raise PlanError(
            f"plan.swap_directory = '{directory}' cannot be written to ({error.strerror}); give a folder that exists"
        ) from error


def _copy_ms(value: Tensor, host: Tensor) -> float:
    times = [_timed_ms(value.device, partial(_there_and_back, value, host)) for _ in range(_HOST_REPEATS + 1)]
    return median(times[1:]) / 2


def _there_and_back(value: Tensor, host: Tensor) -> None:
    host.copy_(value)
    value.copy_(host)


def _timed_ms(device: torch.device, call: Callable[[], None]) -> float:
    start = time.perf_counter_ns()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter_ns() - start) / 1e6
