"""`vpipe verify CONFIG`: prove that a run gives the answer of one process."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from vpipe.cli.shared import read_config_aloud, set_option, threads_of, write_config
from vpipe.errors import LaunchError
from vpipe.words.near import plural

__all__ = ["command"]


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--iterations", default=2, show_default=True, type=click.IntRange(1), help="Batches to train on.")
@set_option("pipeline.schedule=gpipe")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(config: Path, iterations: int, overrides: tuple[str, ...], form: str) -> None:
    """Prove that a run gives the answer of one process.

    Trains a few iterations through the pipeline and again in one process, and compares loss, gradients and weights bit
    for bit. An asynchronous schedule is compared with one process that has the same delays. Exit code 1 when they
    differ. Needs memory for the gradients of all these iterations' updates.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ:
        raise LaunchError(
            f"`vpipe verify` starts its ranks itself; run `vpipe verify {config}` without torchrun (or unset RANK)"
        )
    report = _verify(config, iterations, overrides)
    click.echo(json.dumps(report, indent=2) if form == "json" else _table(report))
    sys.exit(0 if report["equal"] else 1)


def _verify(path: Path, iterations: int, overrides: Sequence[str]) -> dict[str, Any]:
    config = read_config_aloud(path, overrides)  # before torch is imported: mistakes are told at once

    from rich.console import Console

    from vpipe.launch.local import launch_local
    from vpipe.launch.progress import ProgressDisplay
    from vpipe.launch.run_directory import create_run_directory
    from vpipe.verify.verify import (
        pipeline_directory,
        progress_path,
        reference_directory,
        remove_computed,
        report_path,
    )

    directory = create_run_directory(config.log_directory)
    described = write_config(config, directory)
    pipeline = f"{config.pipeline.schedule} on {plural(config.num_ranks, 'rank', 'ranks')}"
    steps = (
        ("pipeline_rank", config.num_ranks, pipeline_directory(directory), pipeline),
        ("reference_rank", 1, reference_directory(directory), "one process"),
    )
    try:
        for function, num_ranks, place, what in steps:
            place.mkdir()
            click.echo(f"training {plural(iterations, 'iteration', 'iterations')}: {what}", err=True)
            with ProgressDisplay(progress_path(place), Console(stderr=True)) as progress:
                launch_local(
                    [f"vpipe.verify.verify:{function}", str(directory), str(described), str(iterations)],
                    num_ranks,
                    run_directory=place,
                    threads_per_rank=threads_of(config),
                    master_port=config.launch.master_port,
                    on_poll=progress.poll,
                )
        report: dict[str, Any] = json.loads(report_path(directory).read_text())
        return report
    finally:
        remove_computed(directory)


def _table(report: Mapping[str, Any]) -> str:
    lines = [f"{'':12}{'compared':>10}{'different':>11}{'largest difference':>20}"]
    for name, row in report["comparisons"].items():
        largest = "not a number" if row["max_abs_difference"] is None else f"{row['max_abs_difference']:g}"
        lines.append(f"{name:12}{row['num_tensors']:>10}{row['num_different']:>11}{largest:>20}")
        if row["first_different"]:
            lines.append(f"{'':12}first: {row['first_different']}")
    against = "one process" if report["synchronous"] else "one process with the same delays"
    verdict = "equal, bit for bit" if report["equal"] else "NOT equal"
    lines.append(f"{report['schedule']} on {plural(report['num_ranks'], 'rank', 'ranks')} against {against}: {verdict}")
    return "\n".join(lines)
