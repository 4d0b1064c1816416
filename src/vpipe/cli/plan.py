"""`vpipe plan CONFIG`: what to cut, keep, recompute and swap, and why. With a profile at hand it imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from vpipe.cli.profiling import obtain_profile, read_counts, read_profile_aloud
from vpipe.cli.shared import read_config_aloud, short
from vpipe.config import RunConfig
from vpipe.config.planned import (
    build_request,
    given_policies,
    name_schedules,
    resolve_cut,
    sizes_needed,
)
from vpipe.plan.explain import compare_lines, explain_lines, plan_lines
from vpipe.plan.plan_file import plan_to_dict
from vpipe.plan.profile import Profile
from vpipe.plan.search import Outcome, Request, find_plan, judge_partition
from vpipe.plan.situation import Plan
from vpipe.plan.units import parse_bytes

__all__ = ["command"]


@click.command(name="plan")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one key, e.g. --set pipeline.num_ranks=8. Repeatable.",
)
@click.option(
    "--profile",
    "profile_file",
    type=click.Path(path_type=Path),
    help="What `vpipe profile` wrote.  [default: the cached one, else measure now]",
)
@click.option(
    "--memory-limit", metavar="SIZE[,SIZE...]", help="Bytes that a rank may hold, e.g. 4GiB: one for all, or one each."
)
@click.option(
    "--partition", default="auto", show_default=True, help="auto, uniform, parameters, compute, or 12,13,13,11."
)
@click.option("--schedule", help="A schedule's name, several (1f1b,zb-h1), or auto.  [default: the run's own]")
@click.option("--microbatches", metavar="N[,N...]|auto", help="Slices of a batch.  [default: the run's own]")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the plan, for plan.partition of a run.")
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
    """Plan the run of the YAML file CONFIG: cuts, policies, microbatches, depths, and the schedule with `auto`.

    Finds the plan with the least time per sample that every rank has the memory for, ranked by the simulator, and
    explains it. Another --partition is checked and simulated instead, and compared with what the planner would do.
    """
    run = read_config_aloud(config, overrides)
    counts = read_counts(run, microbatches)
    profile = _profile_of(config, overrides, run, profile_file, counts)
    request = _request(run, profile, counts, memory_limit, schedule)
    outcome = find_plan(request)
    plan = outcome.best if partition == "auto" else _by_hand(run, request, _partition(partition))
    content = plan_to_dict(plan, profile, outcome.lower_bound_ms)
    if form == "json":
        click.echo(json.dumps(content))
    else:
        click.echo("\n".join(_lines(run, outcome, plan, partition)))
    if output is not None:
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if form == "text":
            click.echo(f"\nwritten to {short(output)}")


def _profile_of(
    path: Path, overrides: Sequence[str], run: RunConfig, file: Path | None, counts: Sequence[int] | None
) -> Profile:
    if file is None:
        return obtain_profile(path, overrides, run, sizes_needed(run, counts))
    return read_profile_aloud(file, run)


def _request(
    run: RunConfig, profile: Profile, counts: Sequence[int] | None, memory_limit: str | None, schedules: str | None
) -> Request:
    """Return what the run asks the planner, with what the options say instead."""
    request = replace(build_request(run, profile), num_microbatches=counts)
    if memory_limit is not None:
        request = replace(request, limits=[parse_bytes(part) for part in memory_limit.split(",")])
    if schedules is not None:
        names = [each for name in schedules.split(",") for each in name_schedules(name.strip())]
        several = len(names) > 1 and run.pipeline.stages_per_rank == 1
        request = replace(request, schedules=names, stages_per_rank=None if several else request.stages_per_rank)
    return request


def _partition(text: str) -> str | list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        return text
    return [int(part) for part in parts]


def _by_hand(run: RunConfig, request: Request, partition: str | Sequence[int]) -> Plan:
    """Judge a partition that was asked for, with what the run says about activations where it says something."""
    cut = resolve_cut(partition, request.profile, run.num_stages)
    return judge_partition(request, cut, given_policies(run, cut))


def _lines(run: RunConfig, outcome: Outcome, plan: Plan, partition: str) -> list[str]:
    if partition != "auto":
        return [*plan_lines(outcome.request, plan), "", *compare_lines(outcome, plan, f"Partition {partition}")]
    lines = explain_lines(outcome)
    own = run.plan.partition
    if isinstance(own, list):
        request = replace(outcome.request, schedules=name_schedules(run.pipeline.schedule))
        lines += ["", *compare_lines(outcome, _by_hand(run, request, own), "The run's own")]
    return lines
