"""The command line: parse arguments, print; no logic. One module per command, imported when it is called."""

from __future__ import annotations

import importlib
import sys

import click

from vpipe._version import __version__
from vpipe.errors import VPipeError
from vpipe.words.near import nearest

__all__ = ["main"]

INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended

COMMANDS = {
    "config": "Print the resolved run of a YAML file.",
    "data": "Prepare training sets from text.",
    "estimate": "Estimate a model on machines that you do not have.",
    "plan": "Plan what to cut, keep, recompute and swap, and say why.",
    "profile": "Measure what the model and the machine cost, for the planner.",
    "schedule": "Show a pipeline schedule: order, bubble, memory.",
    "simulate": "Predict a finished run from its own costs, and show the error.",
    "sweep": "Run or simulate a grid of settings, and show them side by side.",
    "train": "Train the model of a YAML file.",
    "verify": "Prove that a run gives the answer of one process.",
}


class _LazyGroup(click.Group):
    """Import a command's module only when it runs, so that `vpipe schedule` never waits for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            if (near := nearest(cmd_name, COMMANDS)) is not None:
                ctx.fail(f"No such command '{cmd_name}'. Did you mean '{near}'?")
            return None
        command = importlib.import_module(f"vpipe.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vpipe")
def _cli() -> None:
    """Pipeline-parallel training of PyTorch models."""


def main() -> None:
    """Run the command line: exit code 1 and one clear message when something is wrong, no traceback."""
    try:
        _cli(standalone_mode=False)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except click.Abort:
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(1)
    except VPipeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except OSError as error:  # of a file that the user named, or a full disk
        place = "" if error.filename is None else f"{error.filename}: "
        click.echo(f"error: {place}{error.strerror or error}", err=True)
        sys.exit(1)
