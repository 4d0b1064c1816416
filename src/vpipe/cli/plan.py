"""`vpipe plan CONFIG`: what to cut, keep, recompute and swap, and why. With a profile at hand it imports no torch."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from vpipe.cli.shared import read_config_aloud, short
from vpipe.config import RunConfig
from vpipe.errors import PlanError
from vpipe.plan.explain import compare_lines, explain_lines, plan_lines
from vpipe.plan.partition import partition_by_weight, partition_uniform
from vpipe.plan.plan_file import plan_to_dict, trailing_policies
from vpipe.plan.profile import Profile, read_profile
from vpipe.plan.search import Outcome, Request, find_plan, judge_partition
from vpipe.plan.situation import Plan
from vpipe.plan.units import parse_bytes
from vpipe.schedule.registry import SCHEDULES, find_entry

__all__ = ["command"]

_NOT_CHOSEN = ("naive", "searched")
_NAIVE = ("uniform", "parameters", "compute")


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
    help="What `vpipe profile` wrote.  [default: measure now]",
)
@click.option(
    "--memory-limit", metavar="SIZE[,SIZE...]", help="Bytes that a rank may hold, e.g. 4GiB: one for all, or one each."
)
@click.option(
    "--partition", default="auto", show_default=True, help="auto, uniform, parameters, compute, or 12,13,13,11."
)
@click.option("--schedule", help="A schedule's name, several (1f1b,zb-h1), or auto.  [default: the run's own]")
@click.option("--microbatches", metavar="N|auto", help="Slices of a batch.  [default: the run's own]")
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
    counts = _counts(run, microbatches)
    profile = _profile_of(run, profile_file, counts)
    request = Request(
        profile,
        run.num_ranks,
        run.train.batch_size,
        _schedules(run, schedule),
        counts,
        None if memory_limit is None else [parse_bytes(part) for part in memory_limit.split(",")],
        run.pipeline.stages_per_rank if run.pipeline.stages_per_rank > 1 else None,
        {**run.schedule_options, "macrobatch": run.pipeline.macrobatch},
    )
    outcome = find_plan(request)
    plan = outcome.best if partition == "auto" else _by_hand(run, request, partition)
    content = plan_to_dict(plan, profile, outcome.lower_bound_ms)
    if form == "json":
        click.echo(json.dumps(content))
    else:
        click.echo("\n".join(_lines(run, outcome, plan, partition)))
    if output is not None:
        output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if form == "text":
            click.echo(f"\nwritten to {short(output)}")


def _counts(run: RunConfig, microbatches: str | None) -> list[int] | None:
    if microbatches == "auto":
        return None
    if microbatches is None:
        return [run.pipeline.num_microbatches]
    if not microbatches.isdigit() or int(microbatches) < 1:
        raise click.UsageError(f"--microbatches '{microbatches}' is neither a whole number from 1 on nor auto")
    return [int(microbatches)]


def _profile_of(run: RunConfig, file: Path | None, counts: Sequence[int] | None) -> Profile:
    if file is None:
        # Measures, so it needs torch: imported only here, as commands are.
        measure = importlib.import_module("vpipe.train.profile").profile_config
        sizes = None if counts is None else [run.train.batch_size // count for count in counts]
        measured: Profile = measure(run, microbatch_sizes=sizes)
        return measured
    profile = read_profile(file)
    if run.num_blocks is not None and run.num_blocks != profile.num_blocks:
        raise PlanError(
            f"{file}: is of a model of {profile.num_blocks} blocks, and the run's has {run.num_blocks}; measure again "
            "with `vpipe profile`"
        )
    return profile


def _schedules(run: RunConfig, names: str | None) -> tuple[str, ...]:
    """Return the schedules to choose from; `auto` are all closed forms that give the answer of one process."""
    if names == "auto":
        return tuple(name for name, entry in SCHEDULES.items() if entry.synchronous and name not in _NOT_CHOSEN)
    found = (run.pipeline.schedule,) if names is None else tuple(name.strip() for name in names.split(","))
    for name in found:
        find_entry(name)
    return found


def _by_hand(run: RunConfig, request: Request, partition: str) -> Plan:
    """Judge a partition that was asked for, with the run's recompute ratios where it has any."""
    profile = request.profile
    if partition in _NAIVE:
        blocks = profile.sizes[0].blocks
        weights = (
            [block.parameter_bytes for block in blocks],
            [block.forward_ms + block.backward_ms for block in blocks],
        )
        cut = {
            "uniform": lambda: partition_uniform(len(blocks), run.num_stages),
            "parameters": lambda: partition_by_weight(weights[0], run.num_stages),
            "compute": lambda: partition_by_weight(weights[1], run.num_stages),
        }[partition]()
    elif all(part.strip().isdigit() for part in partition.split(",")):
        cut = [int(part) for part in partition.split(",")]
    else:
        raise click.UsageError(
            f"--partition '{partition}' is none; use auto, {', '.join(_NAIVE)}, or blocks per stage such as 12,13,13,11"
        )
    ratios = run.recompute_ratios
    given = any(ratios) and len(ratios) == len(cut)
    return judge_partition(request, cut, trailing_policies(cut, ratios) if given else None)


def _lines(run: RunConfig, outcome: Outcome, plan: Plan, partition: str) -> list[str]:
    if partition != "auto":
        return [*plan_lines(outcome, plan), "", *compare_lines(outcome, plan, f"Partition {partition}")]
    lines = explain_lines(outcome)
    own = run.plan.partition
    if isinstance(own, list):
        own_settings = replace(outcome.request, schedules=(run.pipeline.schedule,))
        lines += ["", *compare_lines(outcome, _by_hand(run, own_settings, ",".join(map(str, own))), "The run's own")]
    return lines
