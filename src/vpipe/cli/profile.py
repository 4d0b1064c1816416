"""`vpipe profile CONFIG`: what the model's blocks and the machine's links cost, measured as the run will run."""

from __future__ import annotations

from pathlib import Path

import click

from vpipe.cli.output import validate_output
from vpipe.cli.profiling import obtain_profile, read_counts
from vpipe.cli.shared import read_config_aloud, set_option, short
from vpipe.config.planning.planned import sizes_needed
from vpipe.planner.explain.profile_lines import profile_lines
from vpipe.planner.profile.profile import write_profile

__all__ = ["command"]


@click.command(name="profile")
@click.argument("config", type=click.Path(path_type=Path))
@set_option("train.batch_size=64")
@click.option(
    "--microbatches",
    metavar="N[,N...]|auto",
    help="Slices of a batch to measure for; auto: a few sizes, for the planner to choose from.  [default: the run's]",
)
@click.option("--no-cache", is_flag=True, help="Measure again, even if this model was measured on this machine before.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the profile, for vpipe plan --profile.")
def command(
    config: Path, overrides: tuple[str, ...], microbatches: str | None, no_cache: bool, form: str, output: Path | None
) -> None:
    """Measure what the model of the YAML file CONFIG costs: the planner's input.

    Starts as many ranks as the run has, so that they contend for the machine as in the run. All of them measure the
    same block at the same time: forward, both halves of the backward, recomputation, optimizer step, and the bytes that
    are kept. Blocks that are alike are measured once, as a row of copies where they are small. Then messages between
    ranks and copies to host memory are measured. Times are means; "spread" is half the distance of their quartiles.

    Results are kept in $XDG_CACHE_HOME/vpipe/profiles (by default ~/.cache) under a hash of model, code, data, sizes
    and machine, and used again by `vpipe plan` and by runs that plan themselves, which say so. What takes no time, such
    as the learning rate or the seed, is not in it.
    """
    validate_output(output, "profile")
    run = read_config_aloud(config, overrides)
    sizes = sizes_needed(run, read_counts(run, microbatches))
    profile = obtain_profile(run, sizes, use_cache=not no_cache)
    click.echo(profile.to_json() if form == "json" else "\n".join(profile_lines(profile)))
    if output is not None:
        write_profile(profile, output)
        if form == "text":
            click.echo(f"\nwritten to {short(output)}")
