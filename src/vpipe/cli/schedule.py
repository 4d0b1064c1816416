"""`vpipe schedule`: show a pipeline schedule. Imports nothing heavy, so the answer comes at once."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from vpipe.draw.chrome_trace import to_chrome_trace
from vpipe.draw.compare import comparison_lines, text_grids
from vpipe.draw.grid import Segment, legend, summary_lines, text_grid, to_dict
from vpipe.draw.overview import overview, overview_lines
from vpipe.draw.palette import TERMINAL_COLOURS
from vpipe.draw.svg import to_svg
from vpipe.schedule.csv_form import read_csv, to_csv
from vpipe.schedule.passes.offload import insert_offloads
from vpipe.schedule.passes.version_moves import insert_version_moves
from vpipe.schedule.registry import SCHEDULES, build_schedule, find_entry
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.search.report import SearchReport, report_search
from vpipe.schedule.search.searched import build_searched, make_request
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import Simulation, simulate

__all__ = ["command"]

_MAX_DRAWN = 20_000  # actions; a picture of more is no picture
_FORMATS = ["text", "json", "svg", "csv", "trace"]


_TIMES = ("forward", "input_grad", "weight_grad", "step", "dispatch", "latency", "bandwidth", "message_bytes")
_OPTIONS = tuple(dict.fromkeys(name for entry in SCHEDULES.values() for name in entry.parameters if name not in _TIMES))
"""Of schedules' builders: all but the times, which the costs of any schedule have."""


class _Times(click.ParamType[Any]):
    """A number, or one per rank."""

    name = "N[,N...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | tuple[float, ...]:
        if not isinstance(value, str):
            return float(value)
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"'{value}' is not a number; write one, or one per rank, e.g. 1,1,2,1", param, ctx)
        return numbers if len(numbers) > 1 else numbers[0]


def _parse_depths(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    try:
        return None if value is None else tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(
            f"'{value}' is not a list of whole numbers; write one per stage, e.g. 6,4,2,0", ctx, param
        ) from None


@click.command(name="schedule")
@click.argument("name", required=False)
@click.option("--ranks", default=4, show_default=True, help="Ranks in the pipeline.")
@click.option(
    "--microbatches", default=8, show_default=True, help="Microbatches that flow until the pipeline is empty."
)
@click.option("--stages-per-rank", type=int, help="Stages that each rank holds.  [default: the schedule's own]")
@click.option(
    "--forward", type=_Times(), default=1.0, show_default=True, help="Time of a rank's share of a microbatch's forward."
)
@click.option("--input-grad", type=_Times(), default=1.0, show_default=True, help="Of its backward: the inputs' half.")
@click.option(
    "--weight-grad", type=_Times(), default=1.0, show_default=True, help="Of its backward: the weights' half."
)
@click.option("--step", type=_Times(), default=0.0, show_default=True, help="Time of a rank's optimizer update.")
@click.option(
    "--move",
    type=_Times(),
    help="Let all stages swap: time to move a rank's activations of one microbatch to host memory, or back.",
)
@click.option(
    "--move-versions",
    type=_Times(),
    help="Let all stages swap weight versions that wait: time to move a rank's weights to host memory, or back.",
)
@click.option("--dispatch", default=0.0, show_default=True, help="Time that every action takes on top.")
@click.option("--latency", default=0.0, show_default=True, help="Time a message is under way.")
@click.option(
    "--bandwidth", type=float, help="Bytes per unit of time on each link and direction.  [default: unlimited]"
)
@click.option("--bytes", "message_bytes", default=0.0, show_default=True, help="Bytes of a message between two stages.")
@click.option(
    "--depths",
    metavar="N,N,...",
    callback=_parse_depths,
    help="1f1b, pipedream: warmup forwards of each stage, before a forward and a backward take turns.",
)
@click.option(
    "--microbatches-per-update", type=int, help="pipedream, pipedream-2bw: gradients per update; above 1: two versions."
)
@click.option("--vertical-sync", is_flag=True, default=None, help="pipedream: one version number through all stages.")
@click.option(
    "--max-in-flight",
    type=_Times(),
    help="searched: microbatches that a rank may hold, two stages on it counting a half each.  [default: --ranks]",
)
@click.option("--memory-limit", type=_Times(), hidden=True)
@click.option("--search-steps", type=click.IntRange(min=0), help="searched: how long, at half a microsecond a step.")
@click.option("--format", "form", type=click.Choice(_FORMATS), default="text", show_default=True)
@click.option("--list", "list_all", is_flag=True, help="List the schedules, with numbers for the given sizes.")
@click.option("--compare", metavar="NAME,NAME,...", help="Show several schedules on one scale of time.")
@click.option(
    "--csv",
    "csv_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Show the schedule in a file: one row per rank, cells like 2F0 (what --format csv writes, or torch's own).",
)
def command(
    name: str | None,
    ranks: int,
    microbatches: int,
    form: str,
    list_all: bool,
    compare: str | None,
    csv_file: Path | None,
    **given: Any,
) -> None:
    """Show the schedule NAME: order, bubble, memory.

    Times are a rank's share of one microbatch, in any unit: one number, or one per rank. Several stages on a rank split
    it evenly. A full backward takes the input-gradient and the weight-gradient time together.
    """
    # Collecting garbage would walk through millions of actions again and again, and there is none.
    gc.disable()
    click.get_current_context().call_on_close(gc.enable)
    if (old := given.pop("memory_limit")) is not None:
        if given["max_in_flight"] is not None:
            raise click.UsageError("--memory-limit and --max-in-flight are the same option; keep --max-in-flight")
        click.echo("warning: --memory-limit is called --max-in-flight now; memory limits are bytes", err=True)
        given["max_in_flight"] = old
    options = {option: value for option in _OPTIONS if (value := given.pop(option)) is not None}
    times = given
    asked = [name is not None, list_all, compare is not None, csv_file is not None]
    if sum(asked) != 1:
        raise click.UsageError(
            f"name a schedule ({', '.join(SCHEDULES)}), or ask for --list, --compare or --csv, one of them"
        )
    if list_all:
        _print_list(ranks, microbatches, form)
        return
    if csv_file is not None:
        schedule, notes = read_csv(csv_file.read_text(encoding="utf-8"), csv_file.stem)
        for note in notes:
            click.echo(f"warning: {csv_file.name}: {note}", err=True)
        schedules = [schedule]
        reports: list[SearchReport | None] = [None]
        sentences = [f"read from {csv_file.name}."]
    else:
        names = [name] if name is not None else [part.strip() for part in str(compare).split(",")]
        built = [_build(each, ranks, microbatches, options, times, shared=name is None) for each in names]
        schedules, reports = [schedule for schedule, _ in built], [report for _, report in built]
        sentences = [find_entry(each).summary for each in names]
    if times["move_versions"] is not None:
        schedules = [insert_version_moves(schedule, range(schedule.num_stages)) for schedule in schedules]
    if times["move"] is not None:
        schedules = [insert_offloads(schedule, range(schedule.num_stages)) for schedule in schedules]
    simulations = [simulate(schedule, _costs(schedule, **times)) for schedule in schedules]
    _print(simulations, sentences, reports, form, several=compare is not None)


def _build(
    name: str, ranks: int, microbatches: int, options: Mapping[str, Any], times: Mapping[str, Any], *, shared: bool
) -> tuple[Schedule, SearchReport | None]:
    """Build a schedule; of options that several schedules share, take those it has. A search is told the times."""
    entry = find_entry(name)
    if shared:
        options = {option: value for option, value in options.items() if option in entry.parameters}
    if entry.builder is not build_searched:
        return build_schedule(name, ranks, microbatches, **options), None
    times = {name: value for name, value in times.items() if name not in ("move", "move_versions")}
    options = {**times, "bandwidth": math.inf if times["bandwidth"] is None else times["bandwidth"], **options}
    schedule = build_schedule(name, ranks, microbatches, **options)
    return schedule, None if shared else report_search(make_request(ranks, microbatches, **options))


def _costs(schedule: Schedule, *, bandwidth: float | None, **times: Any) -> Costs:
    return Costs.from_rank_shares(schedule.placement, bandwidth=math.inf if bandwidth is None else bandwidth, **times)


def _print_list(ranks: int, microbatches: int, form: str) -> None:
    rows = overview(ranks, microbatches)
    if form == "json":
        click.echo(json.dumps([dataclasses.asdict(row) for row in rows]))
    elif form == "text":
        click.echo("\n".join(overview_lines(rows, ranks, microbatches)))
    else:
        raise click.UsageError(f"--list has no --format {form}; it is a table: text or json")


def _print(
    simulations: Sequence[Simulation],
    sentences: Sequence[str],
    reports: Sequence[SearchReport | None],
    form: str,
    *,
    several: bool,
) -> None:
    num_actions = sum(len(events) for simulation in simulations for events in simulation.events)
    if form == "json":
        dicts = [
            to_dict(simulation) | (report.to_dict() if report else {})
            for simulation, report in zip(simulations, reports, strict=True)
        ]
        click.echo(json.dumps(dicts if several else dicts[0]))
    elif form == "csv":
        if several:
            raise click.UsageError("a CSV holds one schedule; name one instead of --compare")
        click.echo(to_csv(simulations[0].schedule), nl=False)
    elif form == "trace":
        click.echo(json.dumps(to_chrome_trace(simulations)))
    elif form == "svg":
        if num_actions > _MAX_DRAWN:
            raise click.UsageError(f"no picture of {num_actions} actions; ask for fewer ranks or microbatches")
        click.echo(to_svg(simulations, sentences), nl=False)
    else:
        _print_pictures(simulations, num_actions)
        lines = comparison_lines(simulations) if several else summary_lines(simulations[0], sentences[0])
        click.echo("\n".join([*lines, *(line for report in reports if report for line in report.lines())]))


def _print_pictures(simulations: Sequence[Simulation], num_actions: int) -> None:
    if num_actions > _MAX_DRAWN:
        click.echo(
            f"(no picture of {num_actions} actions; ask for fewer ranks or microbatches, or for --format json)\n"
        )
        return
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    grids = text_grids(simulations) if len(simulations) > 1 else [text_grid(simulations[0])]
    for simulation, grid in zip(simulations, grids, strict=True):
        if len(simulations) > 1:
            click.echo(click.style(simulation.schedule.name, bold=True))
        for line in grid.lines(columns):
            click.echo("".join(map(_coloured, line)).rstrip())
        click.echo()
    click.echo(f"{legend(*(simulation.schedule for simulation in simulations))}\n")


def _coloured(segment: Segment) -> str:
    text, kind = segment
    return text if kind is None else click.style(text, fg=TERMINAL_COLOURS[kind])
