"""What `vpipe profile` and `vpipe plan` measure: with as many ranks at once as the run has."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from vpipe.cli.progress import show_progress
from vpipe.cli.shared import threads_of, write_config
from vpipe.config import RunConfig
from vpipe.config.planning.planned import own_counts
from vpipe.config.planning.profiled import check_profile_fits, profile_warnings
from vpipe.measure.cache import cache_words
from vpipe.planner.profile.profile import Profile, read_profile

__all__ = ["obtain_profile", "read_counts", "read_profile_aloud"]


def obtain_profile(config: RunConfig, microbatch_sizes: Sequence[int], *, use_cache: bool = True) -> Profile:
    """Return the profile of a run that is in the cache, or start its ranks and measure.

    Raises:
        ConfigError, DataError, ModelError, LaunchError: the run cannot be set up, or a rank failed.
    """
    from vpipe.launch.local import launch_local
    from vpipe.launch.progress import MetricsTail
    from vpipe.measure.profile import find_profile

    if use_cache and (found := find_profile(config, microbatch_sizes, threads_of(config))) is not None:
        click.echo(f"profile: {cache_words(found.fingerprint)}", err=True)
        return found
    folder = Path(tempfile.mkdtemp(prefix="vpipe_profile_"))
    output, progress = folder / "profile.json", folder / "progress.jsonl"
    tail = MetricsTail(progress)
    with show_progress() as show:

        def poll() -> None:
            for record in tail.read():
                show(str(record["step"]), int(str(record["done"])), int(str(record["total"])))

        launch_local(
            [
                "vpipe.measure.profile:profile_ranks",
                *(str(output), str(progress), json.dumps(list(microbatch_sizes)), str(write_config(config, folder))),
            ],
            config.num_ranks,
            run_directory=folder,
            threads_per_rank=threads_of(config),
            master_port=config.launch.master_port,
            on_poll=poll,
        )
    profile = read_profile(output)
    shutil.rmtree(folder)  # what failed leaves its logs
    return profile


def read_profile_aloud(file: Path, config: RunConfig) -> Profile:
    """Return the profile in a file, and show on standard error where it was measured otherwise than the run computes.

    Raises:
        PlanError: the file is missing, holds no profile, or one of another model.
    """
    profile = read_profile(file)
    check_profile_fits(config, profile, str(file))
    for warning in profile_warnings(config, profile, threads_of(config), str(file)):
        click.echo(f"warning: {warning}", err=True)
    return profile


def read_counts(run: RunConfig, microbatches: str | None) -> list[int] | None:
    """Return the numbers of microbatches that `--microbatches` names, without it the run's own; None for `auto`.

    Raises:
        UsageError: it is neither.
    """
    if microbatches == "auto":
        return None
    if microbatches is None:
        return own_counts(run)
    parts = [part.strip() for part in microbatches.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise click.UsageError(f"--microbatches '{microbatches}' is neither a whole number from 1 on nor auto")
    return sorted({int(part) for part in parts})
