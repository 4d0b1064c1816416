"""`vpipe verify CONFIG`: prove that a run gives the answer of one process."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

__all__ = ["command"]


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--iterations", default=2, show_default=True, type=click.IntRange(1), help="Batches to train on.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one key, e.g. --set pipeline.schedule=gpipe."
)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(config: Path, iterations: int, overrides: tuple[str, ...], form: str) -> None:
    """Prove that a run gives the answer of one process.

    Trains a few iterations through the pipeline and again in one process, and compares loss, gradients and weights bit for
    bit. An asynchronous schedule is compared with one process that has the same delays. Exit code 1 when they differ.
    """
    from vpipe.cli.shared import read_config_aloud, threads_of
    from vpipe.launch.local import launch_local
    from vpipe.launch.run_directory import create_run_directory
    from vpipe.train.verify import report_path

    run = read_config_aloud(config, overrides)
    directory = create_run_directory(run.log_directory)
    for function, num_ranks in (("pipeline_rank", run.num_ranks), ("reference_rank", 1)):
        if form == "text":
            what = f"{num_ranks} ranks, {run.pipeline.schedule}" if function == "pipeline_rank" else "one process"
            click.echo(f"training {iterations} iterations: {what}", err=True)
        launch_local(
            [f"vpipe.train.verify:{function}", str(directory), str(config), str(iterations), *overrides],
            num_ranks,
            run_directory=directory,
            threads_per_rank=threads_of(run),
            master_port=run.launch.master_port,
        )
    report = json.loads(report_path(directory).read_text())
    click.echo(json.dumps(report, indent=2) if form == "json" else _table(report))
    sys.exit(0 if report["equal"] else 1)


def _table(report: Mapping[str, Any]) -> str:
    lines = [f"{'':12}{'compared':>10}{'different':>11}{'largest difference':>20}"]
    for name, row in report["comparisons"].items():
        lines.append(f"{name:12}{row['num_tensors']:>10}{row['num_different']:>11}{row['max_abs_difference']:>20g}")
        if row["first_different"]:
            lines.append(f"{'':12}first: {row['first_different']}")
    against = "one process" if report["synchronous"] else "one process with the same delays"
    verdict = "equal, bit for bit" if report["equal"] else "NOT equal"
    lines.append(f"{report['schedule']} on {report['num_ranks']} ranks against {against}: {verdict}")
    return "\n".join(lines)
