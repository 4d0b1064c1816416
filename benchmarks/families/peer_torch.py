"""Peer: torch's own schedules of several stages per rank, on the same emulated devices.

The split costs the same for both: a device's backward is one autograd function that sleeps for I and notes its half for
weights, which sleeps for W when the schedule says so. VPipe gives it the place for notes as it does for linear layers;
torch gets it by its own hook for split backwards, the `dw_builder` of a `PipelineStage`. So neither computes anything
twice, and a full backward sleeps for I + W at once in both.
"""

from __future__ import annotations

import gc
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from benchmarks.common import periods_ms
from benchmarks.simulator.devices import EmulatedDevice, StageTimes, mean_loss
from benchmarks.simulator.ranks import NUM_WARMUP_BATCHES, Configuration, fork, free_port
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B, ScheduleZBVZeroBubble
from torch.distributed.pipelining.stage import _PipelineStageBase

from vpipe.runtime.stage.split import Deferred, run_deferred

__all__ = ["PEERS", "run_torch"]

PEERS = {"interleaved": ScheduleInterleaved1F1B, "zb-v": ScheduleZBVZeroBubble}
"""By the name of VPipe's schedule of the same idea."""


class _Device(EmulatedDevice):
    """A device that notes halves for weights on itself if it `splits`."""

    def __init__(self, times: StageTimes, *, splits: bool) -> None:
        super().__init__(times)
        self._noted = Deferred() if splits else None

    def find_deferred(self) -> Deferred | None:
        """Return where the backward notes its half for weights; None for a full backward."""
        return self._noted

    def take(self) -> Callable[[], None]:
        """Return what computes the halves that were noted since the last call."""
        assert self._noted is not None
        noted = self._noted[:]
        self._noted.clear()
        return lambda: run_deferred(noted)


def run_torch(configuration: Configuration) -> list[float]:
    """Train with torch's schedule of the configuration's idea; return the time of each measured batch on rank 0.

    Raises:
        RuntimeError: a rank failed; its traceback is on standard error.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:

        def be_rank(rank: int) -> None:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            dist.init_process_group("gloo", rank=rank, world_size=configuration.num_ranks)
            found = _train(configuration, rank)
            if rank == 0:
                (Path(folder) / "batch_ms").write_bytes(pickle.dumps(found))
            dist.destroy_process_group()

        fork(configuration.num_ranks, be_rank)
        batch_ms: list[float] = pickle.loads((Path(folder) / "batch_ms").read_bytes())
        return batch_ms


def _train(configuration: Configuration, rank: int) -> list[float]:
    placement = configuration.recipe.build().placement
    devices = {
        stage: _Device(configuration.stages[stage], splits=configuration.is_split)
        for stage in placement.stages_of(rank)
    }
    stages: list[_PipelineStageBase] = [
        PipelineStage(
            device,
            stage,
            placement.num_stages,
            torch.device("cpu"),
            dw_builder=device.take if configuration.is_split else None,
        )
        for stage, device in devices.items()
    ]
    schedule = PEERS[configuration.schedule](stages, configuration.num_microbatches, loss_fn=mean_loss)
    optimizer = torch.optim.SGD([device.weight for device in devices.values()], lr=1e-6)
    batch = torch.ones(configuration.num_microbatches, configuration.boundary_floats)
    inputs = (batch,) if 0 in devices else ()
    target = batch if placement.num_stages - 1 in devices else None
    gc.freeze()
    stamps = []
    for _ in range(NUM_WARMUP_BATCHES + configuration.num_batches):
        optimizer.zero_grad()
        schedule.step(*inputs, target=target, return_outputs=False)
        optimizer.step()
        stamps.append(time.perf_counter())
    return periods_ms(stamps[NUM_WARMUP_BATCHES - 1 :])
