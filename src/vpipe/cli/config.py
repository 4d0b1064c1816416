"""`vpipe config`: print the resolved run of a YAML file, or the reference of all keys."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vpipe.cli.shared import read_config_aloud, set_option
from vpipe.config.load import dump_config
from vpipe.config.reference import reference_lines

__all__ = ["command"]


@click.command(name="config")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@set_option("train.iterations=20", "FILE")
@click.option("--format", "form", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
@click.option("--fields", is_flag=True, help="Print the reference of all keys instead.")
def command(file: Path | None, overrides: tuple[str, ...], form: str, fields: bool) -> None:
    """Print the resolved run of FILE, native or in the original's flat form, with every key."""
    if fields:
        click.echo("\n".join(reference_lines()))
        return
    if file is None:
        raise click.UsageError("Missing argument 'FILE', or --fields.")
    config = read_config_aloud(file, overrides)
    text = dump_config(config) if form == "yaml" else json.dumps(config.model_dump(mode="json"), indent=2)
    click.echo(text.rstrip("\n"))
