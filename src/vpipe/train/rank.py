"""What the process of one rank does in a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vpipe.config import RunConfig, read_config
from vpipe.errors import ConfigError
from vpipe.launch.run_directory import agree_run_directory, point_latest_to
from vpipe.train.planning import plan_run
from vpipe.train.trainer import Trainer
from vpipe.workload.device import join_world

__all__ = ["run_rank", "train_rank"]


def run_rank(arguments: Sequence[str]) -> None:
    """Be one rank of the run that the file `arguments[0]` describes."""
    (path,) = arguments
    train_rank(read_config(path).config)  # whoever started the ranks has told the warnings


def train_rank(config: RunConfig) -> Path:
    """Be one rank of a training run: join the others, plan, train, leave; return the run's directory.

    Raises:
        ConfigError: another number of ranks was started than the configuration says.
    """
    with join_world(config) as world:
        if world.num_ranks != config.num_ranks:
            raise ConfigError(
                f"pipeline.num_ranks is {config.num_ranks} but {world.num_ranks} ranks were started; start as many, or "
                f"change it with --set pipeline.num_ranks={world.num_ranks}"
            )
        run_directory = agree_run_directory(config.log_directory, world)
        planned = plan_run(config, world, run_directory)
        Trainer(planned.config, run_directory, world, planned.prediction).run(point_latest_to)
        return run_directory
