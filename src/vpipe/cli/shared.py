"""What several commands do with their configuration file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from vpipe.config import RunConfig, dump_config, read_config

__all__ = ["read_config_aloud", "set_option", "short", "threads_of", "write_config"]


def read_config_aloud(path: Path, overrides: Sequence[str]) -> RunConfig:
    """Read a run's configuration and show its warnings on standard error."""
    loaded = read_config(path, overrides)
    for warning in loaded.warnings:
        click.echo(f"warning: {warning}", err=True)
    return loaded.config


def set_option(example: str, file: str = "CONFIG") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option --set of a command whose argument is `file`, with an example of what it may change."""
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help=f"Change one key, e.g. --set {example}: section.key or a flat key, and relative paths start from {file}'s "
        "folder. Repeatable; `vpipe config --fields` lists all keys.",
    )


def write_config(config: RunConfig, folder: Path) -> Path:
    """Write a run as it was understood to `folder`, and return the file: the ranks read that one.

    The user's own may be edited until they do, and a path in it may lead elsewhere then.
    """
    path = folder / "config.yml"
    path.write_text(dump_config(config), encoding="utf-8")
    return path


def threads_of(config: RunConfig) -> int:
    """Return the compute threads of each rank: as configured, else an equal share of the cores."""
    return config.launch.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // config.num_ranks)


def short(path: Path) -> Path:
    """Return the path from the working directory on, where it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
