"""Runs of a pipeline, for their ledgers: all ranks are forked from one process, which has imported torch already."""

from __future__ import annotations

import os
import pickle
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import periods_ms
from benchmarks.simulator.ranks import fork, free_port

from vpipe.config import RunConfig
from vpipe.measure.profile import profile_config
from vpipe.planner.profile.profile import Profile
from vpipe.runtime.comm.world import World
from vpipe.runtime.hooks import Hooks
from vpipe.workload.setup import build_setup, build_training_pipeline

__all__ = ["RankRun", "measure_profile", "run_config"]


@dataclass(frozen=True)
class RankRun:
    """What one rank saw."""

    at_peak: Mapping[str, int]
    """Bytes by kind when the rank held most."""
    action: str
    peak_by_kind: Mapping[str, int]
    losses: Sequence[float]
    batch_ms: Sequence[float]
    bytes_moved: int

    @property
    def peak_bytes(self) -> int:
        """Sum up all kinds at the peak."""
        return sum(self.at_peak.values())


def run_config(config: RunConfig) -> list[RankRun]:
    """Train as `config` says on forked ranks and return what each saw, in order."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()

        def be_rank(rank: int) -> None:
            _join(rank, config.num_ranks, port)
            (Path(folder) / str(rank)).write_bytes(pickle.dumps(_train(config)))

        fork(config.num_ranks, be_rank)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(config.num_ranks)]


def measure_profile(config: RunConfig) -> Profile:
    """Measure the model of `config` on as many ranks as it has."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()

        def be_rank(rank: int) -> None:
            _join(rank, config.num_ranks, port)
            profile = profile_config(config)
            if rank == 0:
                (Path(folder) / "profile").write_text(profile.to_json())

        fork(config.num_ranks, be_rank)
        return Profile.from_json((Path(folder) / "profile").read_text())


def _join(rank: int, num_ranks: int, port: int) -> None:
    places = {"RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _train(config: RunConfig) -> RankRun:
    with World.join(timeout_seconds=60.0, backend="gloo") as world:
        setup = build_setup(config)
        pipeline = build_training_pipeline(setup, world, Hooks())
        count = setup.total_iterations
        losses, stamps = [], [time.perf_counter()]
        for result in pipeline.train(setup.batches(pipeline.fields, 0, count), count):
            losses.append(result.loss)
            stamps.append(time.perf_counter())
        pipeline.close()
        ledger, link = pipeline.ledger, pipeline.host_link
        return RankRun(
            dict(ledger.peak.by_kind),
            ledger.peak.action,
            dict(ledger.peak_by_kind),
            losses,
            periods_ms(stamps),
            link.bytes_offloaded if link else 0,
        )
