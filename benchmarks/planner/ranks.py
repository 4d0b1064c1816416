"""Runs of `vpipe train`'s loop on forked ranks, planning included where a run asks for it."""

from __future__ import annotations

import gc
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.simulator.ranks import fork, free_port

from vpipe.config import RunConfig
from vpipe.measure.cache import write_cached
from vpipe.measure.profile import profile_config
from vpipe.planner.profile.profile import Profile
from vpipe.runtime.comm.world import World
from vpipe.train.planning import plan_run
from vpipe.train.trainer import Trainer

__all__ = ["measure_profile", "on_ranks", "train_configs"]

T = TypeVar("T")
Summary = dict[str, Any]


def on_ranks(num_ranks: int, be_rank: Callable[[], T]) -> list[T]:
    """Run `be_rank` on forked processes that may form a group; return what each gave, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()

        def be_process(rank: int) -> None:
            places = {"RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port, "LOCAL_RANK": rank}
            os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
            gc.freeze()
            (Path(folder) / str(rank)).write_bytes(pickle.dumps(be_rank()))

        fork(num_ranks, be_process)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(num_ranks)]


def train_configs(configs: Mapping[str, RunConfig], folder: Path) -> dict[str, Summary]:
    """Train each run, one after another, and return the summaries; its files are in a folder of its name."""

    def be_rank() -> dict[str, Summary]:
        with World.join(timeout_seconds=120.0, backend="gloo") as world:
            return {name: _train(config, folder / name, world) for name, config in configs.items()}

    return on_ranks(next(iter(configs.values())).num_ranks, be_rank)[0]


def _train(config: RunConfig, directory: Path, world: World) -> Summary:
    directory.mkdir(parents=True, exist_ok=True)
    planned = plan_run(config, world, directory)
    summary = Trainer(planned.config, directory, world, planned.prediction).run()
    plan = json.loads((directory / "plan.json").read_text())
    return {**summary, "plan": plan}


def measure_profile(config: RunConfig) -> Profile:
    """Measure the model of a run on as many ranks as it has, and keep the profile where its planned run will look."""
    text = on_ranks(config.num_ranks, lambda: profile_config(config).to_json())[0]
    profile = Profile.from_json(text)
    write_cached(profile)
    return profile
