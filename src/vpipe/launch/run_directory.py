"""The directory of one run: `<log_directory>/<time>`, new for every run, the same for all its ranks."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path

from vpipe.errors import LaunchError
from vpipe.launch.environment import RUN_DIRECTORY
from vpipe.launch.logs import add_log_file, log_path
from vpipe.runtime.comm.process_group import ProcessGroup

__all__ = ["agree_run_directory", "create_run_directory", "point_latest_to"]

_KEY = "vpipe/run_directory"


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


def agree_run_directory(log_directory: Path, group: ProcessGroup) -> Path:
    """Return the run's directory: the launcher's if it made one, else one that rank 0 makes and tells the others.

    In the second case, which is a run started by torchrun itself, this rank's log lines are also copied there.

    Raises:
        LaunchError: the directory cannot be made (on every rank).
    """
    launched = os.environ.get(RUN_DIRECTORY)
    if launched:
        return Path(launched)
    path = _create_and_tell(log_directory, group) if group.rank == 0 else _hear(group)
    path.mkdir(parents=True, exist_ok=True)  # on another machine it may not be a shared directory
    add_log_file(log_path(path, group.rank))
    return path


def _create_and_tell(log_directory: Path, group: ProcessGroup) -> Path:
    try:
        path = create_run_directory(log_directory)
    except LaunchError as error:
        group.store.set(_KEY, json.dumps({"error": str(error)}))
        raise
    group.store.set(_KEY, json.dumps({"path": str(path)}))
    return path


def _hear(group: ProcessGroup) -> Path:
    answer = json.loads(group.store.get(_KEY))
    if "error" in answer:
        raise LaunchError(answer["error"])
    return Path(answer["path"])


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
