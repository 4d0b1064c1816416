"""`vpipe sweep CONFIG --over KEY=VALUES`: run or simulate every combination, and show them side by side."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from vpipe.cli import INTERRUPTED
from vpipe.cli.shared import set_option, short, threads_of
from vpipe.config import RunConfig
from vpipe.errors import ConfigError, LaunchError
from vpipe.planner.profile.profile import Profile, read_profile
from vpipe.report.sweep.store import PLOT, TABLE, SweepStore
from vpipe.report.sweep.sweep import Combination, Result, Row, combine, parse_axis, resolve, run_sweep
from vpipe.report.sweep.table import METRICS, failure_lines, find_best, render_table
from vpipe.words.near import plural

__all__ = ["command"]

_WITHOUT_MODEL = "train.save_model=false"
_FILE_WIDTH = 200
"""Characters of a line where nobody sees it at once: rich would cut at 80."""
_TAKEN = ("samples_per_second", "iteration_ms", "bubble_fraction", "communication_share", "final_loss", "eval_loss")


@click.command(name="sweep")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--over",
    "overs",
    multiple=True,
    required=True,
    metavar="KEY=VALUE,VALUE,...",
    help="A key and its values, e.g. --over batch_size=8,16,32 or --over 'plan.partition=uniform,[26,23]'. Repeatable: "
    "every combination is tried.",
)
@set_option("train.iterations=20")
@click.option("--simulate", is_flag=True, help="Predict each combination from a profile instead of running it.")
@click.option(
    "--profile",
    "profile_file",
    type=click.Path(path_type=Path),
    help="For --simulate: what `vpipe profile` wrote; combinations of another model fail.  [default: the cached ones, "
    "else measure now]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for the results. One that holds the same sweep is gone on with.  [default: a new one, "
    "<log_directory>/sweeps/<time>]",
)
def command(
    config: Path,
    overs: tuple[str, ...],
    overrides: tuple[str, ...],
    simulate: bool,
    profile_file: Path | None,
    output: Path | None,
) -> None:
    """Run or simulate the YAML file CONFIG with every combination of some values, and show them side by side.

    Keys and values are those of --set, which changes a key in all combinations. The folder of results gets table.csv,
    plot.svg, rows.jsonl and a folder per run in runs/; models are not saved, unless --set train.save_model=true. A
    combination that fails has the reason in its row and stops no other. When a sweep was interrupted, the same command
    with --output goes on: what is done is kept, what failed is tried again. The exit code is 1 when nothing succeeded.

    \b
    Columns of table.csv, after the swept keys:
      samples_per_second, iteration_ms, bubble_fraction
      run only        communication_share, peak_memory_bytes (of the process
                      of the largest rank), final_loss, eval_loss
      simulated only  predicted_memory_bytes (tensors on the largest rank)
      folder, error   where the run is; why there is none
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ:
        raise LaunchError("`vpipe sweep` starts its ranks itself; run it without torchrun (or unset RANK)")
    if profile_file is not None and not simulate:
        raise click.UsageError("--profile is for --simulate")
    before = overrides if simulate else (_WITHOUT_MODEL, *overrides)
    combinations = [resolve(each, config, before) for each in combine([parse_axis(over) for over in overs])]
    _require_one(config, combinations)
    profile = _profile(profile_file)
    what = {
        "config": str(config.absolute()),
        "overrides": list(overrides),
        "simulate": simulate,
        "profile": None if profile is None else profile.fingerprint,
    }
    directory = output or _new_directory(combinations)
    store = SweepStore(directory, combinations, what)
    click.echo(f"{plural(len(combinations), 'combination', 'combinations')}; results in {short(directory.absolute())}")
    execute = _simulation(profile, profile_file) if simulate else _training(directory)
    try:
        _run_all(store, combinations, execute)
    except KeyboardInterrupt:
        done = sum(row.is_done for row in store.rows.values())
        click.echo(
            f"interrupted after {done} of {len(combinations)}; to go on, repeat the command with --output {directory}",
            err=True,
        )
        sys.exit(INTERRUPTED)
    _show(store)
    sys.exit(0 if any(row.is_done for row in store.rows.values()) else 1)


def _require_one(config: Path, combinations: Sequence[Combination]) -> None:
    """Refuse a sweep of which nothing can run, before anything is written."""
    if all(each.run is None for each in combinations):
        first = combinations[0]
        raise ConfigError(f"{config}: no combination can run; with {first.label}: {first.error}")


def _new_directory(combinations: Sequence[Combination]) -> Path:
    from vpipe.launch.run_directory import create_run_directory, point_latest_to

    log_directory = next(each.run.log_directory for each in combinations if each.run is not None)
    directory = create_run_directory(log_directory / "sweeps")
    point_latest_to(directory)
    return directory


def _run_all(
    store: SweepStore, combinations: Sequence[Combination], execute: Callable[[Combination, RunConfig], Result]
) -> None:
    kept = dict(store.rows)
    for number, (combination, row) in enumerate(run_sweep(combinations, kept, execute), start=1):
        if kept.get(row.values) is not row:
            store.add(row)
        click.echo(f"{number}/{len(combinations)}  {combination.label}  {_outcome(row, kept)}")
    store.write_reports()


def _outcome(row: Row, kept: dict[tuple[str, ...], Row]) -> str:
    if not row.is_done:
        return "failed"
    shown = [
        f"{metric.show(value)} {metric.heading}"
        for metric in METRICS
        if metric.key in ("samples_per_second", "final_loss") and (value := row.metrics.get(metric.key)) is not None
    ]
    return "  ".join([*shown, *(["[kept]"] if kept.get(row.values) is row else [])])


def _training(directory: Path) -> Callable[[Combination, RunConfig], Result]:
    """Return what runs a combination; its folder is in `directory`."""

    def execute(combination: Combination, config: RunConfig) -> Result:
        from rich.console import Console

        from vpipe.cli.train import train_here
        from vpipe.launch.run_directory import create_run_directory

        folder = create_run_directory(directory / "runs")
        click.echo(f"running {combination.label}", err=True)
        console = Console(quiet=not sys.stdout.isatty())
        train_here(config, folder, console)
        summary = json.loads((folder / "summary.json").read_text())
        metrics = {key: summary[key] for key in _TAKEN} | {"peak_memory_bytes": max(summary["peak_memory_bytes"])}
        return Result(metrics, str(folder.relative_to(directory.absolute())))

    return execute


def _simulation(profile: Profile | None, file: Path | None) -> Callable[[Combination, RunConfig], Result]:
    """Return what simulates a combination, with `profile` of a `file` or else one that is measured or in the cache."""
    told: set[str] = set()

    def execute(combination: Combination, config: RunConfig) -> Result:
        from vpipe.cli.profiling import obtain_profile
        from vpipe.config.planning.planned import own_counts, sizes_needed
        from vpipe.config.planning.profiled import check_profile_fits, profile_warnings
        from vpipe.report.sweep.simulation import simulate_run

        found = profile or obtain_profile(config, sizes_needed(config, own_counts(config)))
        if profile is not None:
            check_profile_fits(config, profile, str(file))
            warnings = profile_warnings(config, profile, threads_of(config), str(file))
            for warning in (each for each in warnings if each not in told):
                click.echo(f"warning: {warning}", err=True)
            told.update(warnings)
        return simulate_run(config, found)

    return execute


def _profile(file: Path | None) -> Profile | None:
    return None if file is None else read_profile(file)


def _show(store: SweepStore) -> None:
    from rich.console import Console

    labels = {id(row): combination.label for combination, row in store.in_order()}
    rows = [row for _, row in store.in_order()]
    click.echo()
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(render_table(store.axes, rows))
    click.echo()
    for line in failure_lines(store.axes, rows):
        click.echo(line)
    best = find_best(rows)
    if best is not None:
        click.echo(f"most samples per second: {labels[id(best)]}")
    directory = short(store.directory.absolute())
    click.echo(f"written: {directory / TABLE}, {directory / PLOT}")
