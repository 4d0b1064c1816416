"""`vpipe train CONFIG`: start all ranks, show how they get on, say what came out."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import click

__all__ = ["command", "run_rank"]


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one key, e.g. --set train.iterations=20."
)
def command(config: Path, overrides: tuple[str, ...]) -> None:
    """Train the model of a YAML file.

    Starts one process per rank on this machine, shows progress, and writes everything about the run to
    <log_directory>/<time>. Under torchrun (`torchrun --nproc-per-node 4 -m vpipe train CONFIG`) it is one rank of the run.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ:
        from vpipe.launch.worker import run_worker

        run_worker(lambda: run_rank([str(config), *overrides]))
        return
    _launch(config, overrides)


def run_rank(arguments: Sequence[str]) -> None:
    """Be one rank of the run that the file `arguments[0]` describes, with the overrides that follow."""
    from vpipe.config import load_config
    from vpipe.launch.run_directory import agree_run_directory
    from vpipe.train.trainer import train_rank

    train_rank(load_config(arguments[0], arguments[1:]), agree_run_directory)


def _launch(path: Path, overrides: Sequence[str]) -> None:
    from rich.console import Console

    from vpipe.cli.shared import read_config_aloud, threads_of
    from vpipe.launch.local import launch_local
    from vpipe.launch.progress import ProgressDisplay
    from vpipe.launch.run_directory import create_run_directory
    from vpipe.report.summary import render_summary

    config = read_config_aloud(path, overrides)
    console = Console()
    run_directory = create_run_directory(config.log_directory)
    console.print(
        f"{config.pipeline.schedule}, {config.num_ranks} ranks, {config.pipeline.num_microbatches} microbatches of "
        f"{config.microbatch_size}; logs in {run_directory}",
        highlight=False,
        soft_wrap=True,
    )
    progress = ProgressDisplay(run_directory / "metrics.jsonl", console, print_frequency=config.train.print_frequency)
    with progress:
        launch_local(
            ["vpipe.cli.train:run_rank", str(path), *overrides],
            config.num_ranks,
            run_directory=run_directory,
            threads_per_rank=threads_of(config),
            master_port=config.launch.master_port,
            on_poll=progress.poll,
        )
    console.print(render_summary(json.loads((run_directory / "summary.json").read_text())))
