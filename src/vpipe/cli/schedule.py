"""`vpipe schedule`: show a pipeline schedule. Imports nothing heavy, so the answer comes at once."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys

import click

from vpipe.schedule.action import Kind
from vpipe.schedule.costs import Costs
from vpipe.schedule.overview import overview, overview_lines
from vpipe.schedule.registry import SCHEDULES, build_schedule, find_entry
from vpipe.schedule.render import Segment, legend, summary_lines, text_grid, to_dict
from vpipe.schedule.simulate import Simulation, simulate

__all__ = ["command"]

_MAX_DRAWN = 20_000  # actions; a picture of more is no picture
_COLOURS = {
    Kind.F: "blue",
    Kind.R: "cyan",
    Kind.B: "green",
    Kind.I: "green",
    Kind.W: "magenta",
    Kind.STEP: "yellow",
}


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
@click.option("--forward", default=1.0, show_default=True, help="Time of a rank's share of one microbatch's forward.")
@click.option("--input-grad", default=1.0, show_default=True, help="The same, input-gradient half of the backward.")
@click.option("--weight-grad", default=1.0, show_default=True, help="The same, weight-gradient half.")
@click.option("--step", default=0.0, show_default=True, help="Time of a rank's optimizer update.")
@click.option("--latency", default=0.0, show_default=True, help="Time a message is under way.")
@click.option(
    "--bandwidth", type=float, help="Bytes per unit of time on each link and direction.  [default: unlimited]"
)
@click.option("--bytes", "message_bytes", default=0.0, show_default=True, help="Bytes of a message between two stages.")
@click.option(
    "--depths",
    metavar="N,N,...",
    callback=_parse_depths,
    help="1f1b, pipedream: forwards that each stage runs before its first backward.",
)
@click.option(
    "--microbatches-per-update", type=int, help="pipedream: gradients per update; above 1: two versions (2BW)."
)
@click.option("--vertical-sync", is_flag=True, default=None, help="pipedream: one version number through all stages.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--list", "list_all", is_flag=True, help="List the schedules, with numbers for the given sizes.")
def command(
    name: str | None,
    ranks: int,
    microbatches: int,
    stages_per_rank: int | None,
    forward: float,
    input_grad: float,
    weight_grad: float,
    step: float,
    latency: float,
    bandwidth: float | None,
    message_bytes: float,
    depths: tuple[int, ...] | None,
    microbatches_per_update: int | None,
    vertical_sync: bool | None,
    form: str,
    list_all: bool,
) -> None:
    """Show the schedule NAME: order, bubble, memory.

    Times are a rank's share of one microbatch, in any unit; several stages on a rank split it evenly. A full backward
    takes the input-gradient and the weight-gradient time together.
    """
    if list_all:
        _print_list(ranks, microbatches, form)
        return
    if name is None:
        raise click.UsageError(f"name a schedule ({', '.join(SCHEDULES)}), or ask for --list")
    given = {
        "depths": depths,
        "microbatches_per_update": microbatches_per_update,
        "vertical_sync": vertical_sync or None,
    }
    options = {option: value for option, value in given.items() if value is not None}
    schedule = build_schedule(name, ranks, microbatches, stages_per_rank=stages_per_rank, **options)
    costs = Costs.from_rank_shares(
        schedule.placement,
        forward=forward,
        input_grad=input_grad,
        weight_grad=weight_grad,
        step=step,
        latency=latency,
        bandwidth=math.inf if bandwidth is None else bandwidth,
        message_bytes=message_bytes,
    )
    simulation = simulate(schedule, costs)
    if form == "json":
        click.echo(json.dumps(to_dict(simulation)))
    else:
        _print_text(simulation, find_entry(name).summary)


def _print_list(ranks: int, microbatches: int, form: str) -> None:
    rows = overview(ranks, microbatches)
    if form == "json":
        click.echo(json.dumps([dataclasses.asdict(row) for row in rows]))
    else:
        click.echo("\n".join(overview_lines(rows, ranks, microbatches)))


def _print_text(simulation: Simulation, sentence: str) -> None:
    num_actions = sum(map(len, simulation.events))
    if num_actions > _MAX_DRAWN:
        click.echo(
            f"(no picture of {num_actions} actions; ask for fewer ranks or microbatches, or for --format json)\n"
        )
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for line in text_grid(simulation).lines(columns):
            click.echo("".join(map(_coloured, line)).rstrip())
        click.echo(f"\n{legend(simulation.schedule)}\n")
    click.echo("\n".join(summary_lines(simulation, sentence)))


def _coloured(segment: Segment) -> str:
    text, kind = segment
    return text if kind is None else click.style(text, fg=_COLOURS[kind])
