"""What the process of one rank does in a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vpipe.config import RunConfig, load_config
from vpipe.errors import ConfigError
from vpipe.launch.run_directory import agree_run_directory, point_latest_to
from vpipe.runtime.comm.process_group import process_group
from vpipe.train.planning import plan_run
from vpipe.train.trainer import Trainer
from vpipe.workload.device import device_of

__all__ = ["run_rank", "train_rank"]


def run_rank(arguments: Sequence[str]) -> None:
    """Be one rank of the run that the file `arguments[0]` describes."""
    (path,) = arguments
    train_rank(load_config(Path(path)))


def train_rank(config: RunConfig) -> Path:
    """Be one rank of a training run: join the others, plan, train, leave; return the run's directory.

    Raises:
        ConfigError: another number of ranks was started than the configuration says.
    """
    launch = config.launch
    with process_group(launch.distributed_backend, launch.timeout_seconds, device=device_of(config)) as group:
        if group.num_ranks != config.num_ranks:
            raise ConfigError(
                f"pipeline.num_ranks is {config.num_ranks} but {group.num_ranks} ranks were started; start as many, or "
                f"change it with --set pipeline.num_ranks={group.num_ranks}"
            )
        run_directory = agree_run_directory(config.log_directory, group)
        planned = plan_run(config, group, run_directory)
        Trainer(planned.config, run_directory, group, planned.plan).run(point_latest_to)
        return run_directory
