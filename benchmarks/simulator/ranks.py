"""Runs of a pipeline for this benchmark: all ranks are forked from one process, which has imported torch already."""

from __future__ import annotations

import gc
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from benchmarks.common import periods_ms
from benchmarks.simulator.devices import EmulatedDevice, StageTimes, mean_loss
from torch import Tensor, nn

from vpipe.plan.plan import Plan
from vpipe.plan.recipe import Recipe
from vpipe.runtime.comm.throttle import SlowLink, emulate_slow_links
from vpipe.runtime.hooks import Hooks
from vpipe.runtime.pipeline import Pipeline
from vpipe.runtime.trace import TraceEvent, TraceRecorder
from vpipe.schedule.schedule import uses_split_backward

NUM_WARMUP_BATCHES = 3


@dataclass(frozen=True)
class RealModel:
    """Transformer blocks that really compute, `partition` of them on each stage."""

    partition: tuple[int, ...]
    hidden_size: int = 256
    num_tokens: int = 128
    microbatch_size: int = 2
    alone: int | None = None
    """The only stage there is: for measuring what it costs."""

    @property
    def cut(self) -> tuple[int, ...]:
        """Return the blocks of each stage."""
        return self.partition if self.alone is None else (self.partition[self.alone] + (self.alone > 0),)

    def modules(self) -> list[nn.Module]:
        """Return the modules of the pipeline; a later stage alone begins with one whose output needs a gradient."""
        blocks = self._blocks()
        if self.alone is None:
            return blocks
        start = sum(self.partition[: self.alone])
        own = blocks[start : start + self.partition[self.alone]]
        return [EmulatedDevice(StageTimes(0.0, 0.0, 0.0)), *own] if self.alone else own

    def _blocks(self) -> list[nn.Module]:
        torch.manual_seed(0)
        size = self.hidden_size
        return [
            nn.TransformerEncoderLayer(size, nhead=4, dim_feedforward=4 * size, dropout=0.0, batch_first=True)
            for _ in range(sum(self.partition))
        ]

    def batch(self, num_microbatches: int) -> Tensor:
        """Return inputs of one batch."""
        shape = (num_microbatches * self.microbatch_size, self.num_tokens, self.hidden_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    @property
    def message_bytes(self) -> int:
        """Count the bytes that cross each cut."""
        return 4 * self.microbatch_size * self.num_tokens * self.hidden_size


@dataclass(frozen=True)
class Configuration:
    """One pipeline: emulated devices with a time per stage, or a real model."""

    name: str
    schedule: str
    num_ranks: int
    num_microbatches: int
    stages: tuple[StageTimes, ...] = ()
    real: RealModel | None = None
    boundary_floats: int = 16 * 1024
    link: SlowLink | None = None
    depths: tuple[int, ...] | None = None
    macrobatch: bool = False
    vertical_sync: bool = False
    num_batches: int = 12

    @property
    def message_bytes(self) -> int:
        """Count the bytes that cross each cut for one microbatch."""
        return self.real.message_bytes if self.real else 4 * self.boundary_floats

    @property
    def num_stages(self) -> int:
        """Count the stages."""
        return len(self.real.cut if self.real else self.stages)

    @property
    def recipe(self) -> Recipe:
        """Return the order of its actions."""
        return Recipe(
            self.schedule,
            self.num_microbatches,
            self.num_ranks,
            self.num_stages // self.num_ranks,
            depths=self.depths,
            macrobatch=self.macrobatch,
            vertical_sync=self.vertical_sync,
        )

    @property
    def is_split(self) -> bool:
        """Tell whether backwards come in two halves."""
        return uses_split_backward(self.recipe.build())


@dataclass(frozen=True)
class Run:
    """What came out: the time of each measured batch, and the measured batches' actions on all ranks."""

    batch_ms: list[float]
    events: list[TraceEvent]


def run_pipeline(configuration: Configuration, num_copies: int = 1) -> list[Run]:
    """Run all ranks of a configuration and return what they measured: of so many copies that run beside each other.

    Raises:
        RuntimeError: a rank failed; its traceback is on standard error.
    """
    num_ranks, ports = configuration.num_ranks, [free_port() for _ in range(num_copies)]
    with tempfile.TemporaryDirectory() as folder:

        def be_process(process: int) -> None:
            copy, rank = divmod(process, num_ranks)
            if num_ranks > 1:
                places = {"RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": ports[copy], "LOCAL_RANK": rank}
                os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
            (Path(folder) / str(process)).write_bytes(pickle.dumps(_train(configuration, rank)))

        fork(num_copies * num_ranks, be_process)
        found = [pickle.loads((Path(folder) / str(place)).read_bytes()) for place in range(num_copies * num_ranks)]
    copies = [found[start : start + num_ranks] for start in range(0, len(found), num_ranks)]
    return [Run(ranks[0][0], [event for _, events in ranks for event in events]) for ranks in copies]


def fork(num_processes: int, be_process: Callable[[int], None]) -> None:
    """Run `be_process(index)` in so many processes at once.

    Raises:
        RuntimeError: one of them failed; its traceback is on standard error.
    """
    children = []
    for index in range(num_processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                be_process(index)
                code = 0
            except Exception:
                traceback.print_exc()
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise RuntimeError(f"processes ended with exit codes {codes}")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def run_stages_alone(configuration: Configuration) -> list[Run]:
    """Run each stage of a real model by itself, all at once, each in a process that has no other ranks."""
    with tempfile.TemporaryDirectory() as folder:

        def be_stage(stage: int) -> None:
            alone = _stage_alone(configuration, stage)
            (Path(folder) / str(stage)).write_bytes(pickle.dumps(_train(alone, 0)))

        fork(configuration.num_stages, be_stage)
        return [
            Run(*pickle.loads((Path(folder) / str(stage)).read_bytes())) for stage in range(configuration.num_stages)
        ]


def _stage_alone(configuration: Configuration, stage: int) -> Configuration:
    """Return a pipeline of one rank: with as many weight versions as the stage has among others, if it has several."""
    assert configuration.real is not None
    depths = None if configuration.recipe.synchronous else (configuration.num_stages - 1 - stage,)
    real = replace(configuration.real, alone=stage)
    return replace(configuration, num_ranks=1, real=real, depths=depths)


def _train(configuration: Configuration, rank: int) -> tuple[list[float], list[TraceEvent]]:
    size, real = configuration.num_microbatches, configuration.real
    recorder = TraceRecorder(rank, size, lambda: pipeline.iteration)
    modules = real.modules() if real else [EmulatedDevice(times) for times in configuration.stages]
    batch = real.batch(size) if real else torch.ones(size, configuration.boundary_floats)
    pipeline = Pipeline(
        modules,
        nn.functional.mse_loss if real else mean_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-6),
        plan=Plan.of(configuration.recipe, partition=real.cut if real else "uniform"),
        hooks=Hooks(record=recorder, waited=recorder.waited),
    )
    if configuration.link is not None:
        emulate_slow_links(pipeline.transport, configuration.link)
    # The last batch, in which an asynchronous pipeline drains, is not measured.
    num_batches = NUM_WARMUP_BATCHES + configuration.num_batches
    gc.freeze()
    with pipeline:
        stamps = [time.perf_counter() for _ in pipeline.train([(batch, batch)] * (num_batches + 1))][:num_batches]
    measured = range(NUM_WARMUP_BATCHES, num_batches)
    events = [event for event in recorder.events() if event.iteration in measured]
    return periods_ms(stamps[NUM_WARMUP_BATCHES - 1 :]), events
