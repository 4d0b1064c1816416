"""Progress of a library call: bars on a terminal, a line per step elsewhere; on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from vpipe.data.progress import Progress

__all__ = ["show_progress"]

_LINE_EVERY_SECONDS = 10.0


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Give a callback `(step, done, total)` that shows what it hears."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def update(step: str, done: int, total: int) -> None:
            for name, task in tasks.items():
                if name != step:
                    bars.update(task, total=bars.tasks[task].total or 1, completed=bars.tasks[task].total or 1)
            if step not in tasks:
                tasks[step] = bars.add_task(step)
            bars.update(tasks[step], total=total or None, completed=done)

        yield update


class _Lines:
    """A line when a step begins, and another every ten seconds while it lasts."""

    def __init__(self) -> None:
        self._step = ""
        self._last = time.monotonic()

    def __call__(self, step: str, done: int, total: int) -> None:
        now = time.monotonic()
        if step == self._step and (now - self._last < _LINE_EVERY_SECONDS or done == total):
            return
        click.echo(f"{step}: {done:,} of {total:,}" if step == self._step else step, err=True)
        self._step, self._last = step, now
