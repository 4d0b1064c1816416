"""`vpipe plan CONFIG`: what to cut, keep, recompute and swap, and why. With a profile at hand it imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from vpipe.cli.output import validate_output
from vpipe.cli.profiling import obtain_profile, read_counts, read_profile_aloud
from vpipe.cli.shared import read_config_aloud, set_option, short
from vpipe.config import RunConfig
from vpipe.config.original.files import read_partition_file
from vpipe.config.planning.planned import build_request, judge_by_hand, name_schedules, sizes_needed
from vpipe.config.text import parse_json, read_text
from vpipe.errors import ConfigError, PlanError
from vpipe.plan.shown import show_lines
from vpipe.planner.explain.explain import compare_lines, explain_lines, plan_lines
from vpipe.planner.profile.profile import Profile
from vpipe.planner.search.candidate import Candidate
from vpipe.planner.search.outcome_file import candidate_to_dict, outcome_to_dict
from vpipe.planner.search.search import Outcome, Request, find_plan
from vpipe.schedule.registry import known_entry
from vpipe.words.units import parse_bytes

__all__ = ["command"]


def _show(ctx: click.Context, param: click.Parameter, file: Path | None) -> None:
    if file is None:
        return
    content = parse_json(read_text(file), str(file))
    if not isinstance(content, dict) or "partition" not in content:
        raise ConfigError(f"{file}: is no plan file: a JSON object with a 'partition', as `vpipe plan -o` writes one")
    read_partition_file(file)  # tells every key that is wrong
    click.echo("\n".join(show_lines(content)))
    ctx.exit()


@click.command(name="plan")
@click.argument("config", type=click.Path(path_type=Path))
@set_option("pipeline.num_ranks=8")
@click.option(
    "--profile",
    "profile_file",
    type=click.Path(path_type=Path),
    help="What `vpipe profile` wrote for this model.  [default: the cached one, else measure now]",
)
@click.option(
    "--memory-limit", metavar="SIZE[,SIZE...]", help="Bytes that a rank may hold, e.g. 4GiB: one for all, or one each."
)
@click.option(
    "--partition",
    default="auto",
    show_default=True,
    metavar="NAME|LIST|FILE",
    help="auto, uniform, parameters, compute, blocks per stage as 12,13,13,11, or a plan file.",
)
@click.option("--schedule", help="A schedule's name, several (1f1b,zb-h1), or auto.  [default: the run's own]")
@click.option("--microbatches", metavar="N[,N...]|auto", help="Slices of a batch.  [default: the run's own]")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the plan, for plan.partition of a run.")
@click.option(
    "--show",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_show,
    help="Show the plan in a file, such as a run's plan.json, and plan nothing.",
)
def command(
    config: Path,
    overrides: tuple[str, ...],
    profile_file: Path | None,
    memory_limit: str | None,
    partition: str,
    schedule: str | None,
    microbatches: str | None,
    form: str,
    output: Path | None,
) -> None:
    """Plan the run of the YAML file CONFIG: cuts, policies, microbatches, warmups, and the schedule with `auto`.

    Finds the plan with the least time per sample that every rank has the memory for, ranked by the simulator, and
    explains it. Another --partition is checked and simulated instead, as a run with it would run, and compared with
    what the planner would do. The options of one value say what --set plan.memory_limit, plan.partition,
    pipeline.schedule and pipeline.num_microbatches would.

    A run takes all of a plan from the file that -o writes: --set plan.partition=FILE.
    """
    validate_output(output, "plan")
    given = [*overrides, *_as_overrides(memory_limit, partition, schedule, microbatches)]
    run = read_config_aloud(config, given)
    counts = read_counts(run, microbatches)
    profile = _profile_of(run, profile_file, counts)
    request = _request(run, profile, counts, schedule)
    outcome = find_plan(request)
    is_free = partition == "auto"
    plan = outcome.best if is_free else judge_by_hand(run, request, run.plan.partition, is_planned=run.needs_plan)
    content = {**candidate_to_dict(plan, profile, outcome.lower_bound_ms), **outcome_to_dict(outcome, plan)}
    if form == "json":
        click.echo(json.dumps(content))
    else:
        click.echo("\n".join(_lines(run, outcome, plan, None if is_free else partition)))
    if output is not None:
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if form == "text":
            click.echo(f"\nwritten to {short(output)}")


def _as_overrides(
    memory_limit: str | None, partition: str, schedule: str | None, microbatches: str | None
) -> list[str]:
    """Say with --set what the options of one value say, so that what is planned is what a run with it is."""
    given = []
    if memory_limit is not None:
        given.append(f"plan.memory_limit={[parse_bytes(part) for part in memory_limit.split(',')]}")
    if partition != "auto":
        given.append(f"plan.partition={_partition(partition)}")
    if schedule is not None and "," not in schedule:
        given.append(f"pipeline.schedule={schedule}")
    if microbatches is not None and (microbatches == "auto" or microbatches.isdigit()):
        given.append(f"pipeline.num_microbatches={microbatches}")
    return given


def _partition(text: str) -> str:
    """Return a partition as YAML: a list with its brackets, a file of the working directory with its folder."""
    if all(part.strip().isdigit() for part in text.split(",")):
        return f"[{text}]"
    return str(Path(text).absolute()) if Path(text).is_file() else text


def _profile_of(run: RunConfig, file: Path | None, counts: Sequence[int] | None) -> Profile:
    if file is None:
        return obtain_profile(run, sizes_needed(run, counts))
    return read_profile_aloud(file, run)


def _request(run: RunConfig, profile: Profile, counts: Sequence[int] | None, schedules: str | None) -> Request:
    """Return what the run asks the planner, with several numbers of microbatches or schedules where these are given."""
    request = replace(build_request(run, profile), num_microbatches=counts)
    if schedules is None or "," not in schedules:
        return request
    names = [each for name in schedules.split(",") for each in name_schedules(name.strip())]
    entry, per_rank = known_entry(run.pipeline.schedule), run.pipeline.stages_per_rank
    is_default = per_rank == (1 if entry is None else entry.default_stages_per_rank)
    return replace(request, schedules=names, stages_per_rank=None if is_default else per_rank)


def _lines(run: RunConfig, outcome: Outcome, plan: Candidate, partition: str | None) -> list[str]:
    if partition is not None:
        return [*plan_lines(outcome.request, plan), "", *compare_lines(outcome, plan, f"Partition {partition}")]
    lines = explain_lines(outcome)
    own = run.plan.partition
    if isinstance(own, list):
        request, pipeline = outcome.request, run.pipeline
        if pipeline.schedule != "auto":  # several may have been asked for
            names = name_schedules(pipeline.schedule)
            request = replace(request, schedules=names, stages_per_rank=pipeline.stages_per_rank)
        lines += ["", *_own_lines(run, outcome, request)]
    return lines


def _own_lines(run: RunConfig, outcome: Outcome, request: Request) -> list[str]:
    try:
        plan = judge_by_hand(run, request, run.plan.partition, is_planned=run.needs_plan)
    except PlanError as error:
        return [f"The run's own {run.plan.partition} cannot be compared: {error}"]
    return compare_lines(outcome, plan, "The run's own")
