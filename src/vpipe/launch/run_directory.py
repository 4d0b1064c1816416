"""The directory of one run: `<log_directory>/<time>`, new for every run, the same for all its ranks."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from vpipe.errors import LaunchError
from vpipe.launch.environment import RUN_DIRECTORY
from vpipe.launch.logs import add_log_file, log_path
from vpipe.runtime.comm.world import World

__all__ = ["agree_run_directory", "create_run_directory", "point_latest_to"]


def create_run_directory(log_directory: Path) -> Path:
    """Create `<log_directory>/<time>`, never an existing one.

    Raises:
        LaunchError: the directory cannot be made.
    """
    now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    number = 1
    while True:
        path = log_directory.absolute() / (now if number == 1 else f"{now}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        except OSError as error:
            raise LaunchError(
                f"cannot create a run directory in log_directory '{log_directory}': {error.strerror}; choose another"
            ) from error
        return path


def agree_run_directory(log_directory: Path, world: World) -> Path:
    """Return the run's directory: the launcher's if it made one, else one that rank 0 makes and tells the others.

    In the second case, which is a run started by torchrun itself, this rank's log lines are also copied there.

    Raises:
        LaunchError: the directory cannot be made (on every rank).
    """
    launched = os.environ.get(RUN_DIRECTORY)
    if launched:
        return Path(launched)
    answers = world.gather(_create(log_directory) if world.rank == 0 else None, "rank 0 to make the run's directory")
    if isinstance(answers[0], LaunchError):
        raise answers[0]
    path = Path(str(answers[0]))
    path.mkdir(parents=True, exist_ok=True)  # on another machine it may not be a shared directory
    add_log_file(log_path(path, world.rank))
    return path


def _create(log_directory: Path) -> str | LaunchError:
    """Return a new directory, or why there can be none, for all ranks to say the same."""
    try:
        return str(create_run_directory(log_directory))
    except LaunchError as error:
        return error


def point_latest_to(path: Path) -> None:
    """Let `latest`, beside the directory `path`, be that directory; a file or directory of that name is left alone.

    Not when a run is only created: one that is refused, or that verifies, is nothing that another can start from.
    """
    latest = path.parent / "latest"
    if latest.exists() and not latest.is_symlink():
        return  # somebody's own file or directory
    new = path.parent / f".latest.{os.getpid()}"
    try:
        new.symlink_to(path.name)
        new.replace(latest)
    except OSError:
        # A convenience only: some file systems know no symbolic links.
        new.unlink(missing_ok=True)
