"""`vpipe train CONFIG`: start all ranks, show how they get on, say what came out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vpipe.cli import INTERRUPTED
from vpipe.cli.shared import read_config_aloud, set_option, short, threads_of, write_config
from vpipe.launch.worker import run_worker
from vpipe.report.trace import read_timeline
from vpipe.words.near import plural

if TYPE_CHECKING:
    from rich.console import Console

    from vpipe.config import RunConfig

__all__ = ["command", "train_here"]


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@set_option("train.iterations=20")
def command(config: Path, overrides: tuple[str, ...]) -> None:
    """Train the model of the YAML file CONFIG.

    Starts one process per rank on this machine, shows progress, and writes everything about the run to
    <log_directory>/<time>: config.yml, plan.json, output.log.<rank>, metrics.jsonl, timeline.json (for
    ui.perfetto.dev), summary.json and the trained model. <log_directory>/latest leads to the last run that began.

    Under torchrun (torchrun --nproc-per-node 4 -m vpipe train CONFIG) it is one rank of the run.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ:
        run_worker(lambda: _be_rank(config, overrides))
    else:
        _launch(config, overrides)


def _be_rank(path: Path, overrides: Sequence[str]) -> None:
    from vpipe.config import load_config
    from vpipe.train.rank import train_rank

    run_directory = train_rank(load_config(path, overrides))
    if os.environ.get("RANK", "0") == "0":
        _print_summary(run_directory)


def train_here(config: RunConfig, run_directory: Path, console: Console) -> None:
    """Start all ranks of the run on this machine, show on `console` how they get on, and return when they have ended.

    Raises:
        LaunchError: a rank failed, or none could be started.
        KeyboardInterrupt: Ctrl-C; all ranks have ended.
    """
    from vpipe.launch.local import launch_local
    from vpipe.launch.progress import ProgressDisplay

    progress = ProgressDisplay(run_directory / "metrics.jsonl", console, print_frequency=config.train.print_frequency)
    with progress:
        launch_local(
            ["vpipe.train.rank:run_rank", str(write_config(config, run_directory))],
            config.num_ranks,
            run_directory=run_directory,
            threads_per_rank=threads_of(config),
            master_port=config.launch.master_port,
            on_poll=progress.poll,
        )


def _launch(path: Path, overrides: Sequence[str]) -> None:
    config = read_config_aloud(path, overrides)  # before torch is imported: mistakes are told at once

    from rich.console import Console

    from vpipe.launch.run_directory import create_run_directory

    run_directory = create_run_directory(config.log_directory)
    ranks = plural(config.num_ranks, "rank", "ranks")
    click.echo(f"{config.pipeline.schedule}, {ranks}, {_slices(config)}; logs in {short(run_directory)}")
    try:
        train_here(config, run_directory, Console())
    except KeyboardInterrupt:
        click.echo(f"interrupted; all ranks were ended. Logs: {short(run_directory)}/output.log.*", err=True)
        sys.exit(INTERRUPTED)
    _print_summary(run_directory)


def _slices(config: RunConfig) -> str:
    if config.pipeline.num_microbatches == "auto":
        return "microbatches to be planned"
    size = config.microbatch_size
    sizes = str(size) if config.is_even else f"{size} or {size - 1}"
    return f"{plural(config.num_microbatches, 'microbatch', 'microbatches')} of {sizes}"


def _print_summary(run_directory: Path) -> None:
    from rich.console import Console

    from vpipe.report.summary import render_summary

    summary = json.loads((run_directory / "summary.json").read_text())
    Console().print(render_summary(summary, read_timeline(run_directory / "timeline.json")))
