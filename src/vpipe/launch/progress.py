"""Shows how a run gets on, from the metrics that its ranks write."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["MetricsTail", "ProgressDisplay", "format_metrics"]

_FORMATS = {
    "epoch": "epoch {:g}",
    "loss": "loss {:.4f}",
    "eval_loss": "eval loss {:.4f}",
    "learning_rate": "lr {:.3g}",
    "samples_per_second": "{:.1f} samples/s",
    "elapsed_s": "{:.0f} s",
}


class MetricsTail:
    """Reads the records that were added to a file of one JSON object per line since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def read(self) -> Iterator[dict[str, object]]:
        """Yield the new records; a last line without its end waits, anything that is no JSON object is left out."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                data = file.read()
        except FileNotFoundError:
            return
        complete = data[: data.rfind(b"\n") + 1]
        self._position += len(complete)
        for line in complete.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


class ProgressDisplay:
    """Show a bar on a terminal, elsewhere a line every `print_frequency` iterations; pass `poll` to `launch_local`.

    `metrics` is the file that the ranks write, with keys such as iteration, iterations, epoch, loss, eval_loss,
    learning_rate, samples_per_second and elapsed_s, any of which may be missing. `planning.jsonl` beside it has what a
    run tells that plans itself.
    """

    def __init__(self, metrics: Path, console: Console, *, print_frequency: int = 1) -> None:
        self._tail = MetricsTail(metrics)
        self._planning = MetricsTail(metrics.with_name("planning.jsonl"))
        self._step = ""
        self._console = console
        self._print_frequency = max(1, print_frequency)
        self._printed = -1
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> ProgressDisplay:
        if self._console.is_terminal:
            columns = (MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
            self._progress = Progress(BarColumn(), *columns, console=self._console)
            self._task = self._progress.add_task("starting", total=None)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def poll(self) -> None:
        """Show what is new."""
        for record in self._planning.read():
            self._show_planning(record)
        for record in self._tail.read():
            if self._progress is None:
                self._print(record)
            else:
                self._update(self._progress, record)

    def _show_planning(self, record: Mapping[str, object]) -> None:
        """Show how far a run that plans itself is with that, and the plan in words."""
        if "text" in record:
            self._console.print(str(record["text"]), markup=False, highlight=False, soft_wrap=True)
            return
        step, done, total = str(record.get("step", "")), _number(record, "done"), _number(record, "total")
        if self._progress is not None:
            self._progress.update(self._task, description=step, completed=done, total=total)
        elif step != self._step:
            self._console.print(step, markup=False, highlight=False, soft_wrap=True)
        self._step = step

    def _update(self, progress: Progress, record: Mapping[str, object]) -> None:
        shown = {key: value for key, value in record.items() if key not in ("iteration", "iterations", "elapsed_s")}
        done, total = _number(record, "iteration"), _number(record, "iterations")
        progress.update(self._task, description=format_metrics(shown), completed=done, total=total)

    def _print(self, record: Mapping[str, object]) -> None:
        iteration = _number(record, "iteration")
        is_last = iteration is not None and iteration == _number(record, "iterations")
        due = -1 if iteration is None else int(iteration // self._print_frequency)
        line = format_metrics(record)
        if line and (due > self._printed or is_last or "eval_loss" in record):
            self._printed = max(due, self._printed)
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def format_metrics(record: Mapping[str, object]) -> str:
    """Write one record as a line, leaving out what it does not have."""
    iteration, iterations = _number(record, "iteration"), _number(record, "iterations")
    parts = []
    if iteration is not None:
        parts.append(f"iteration {iteration:.0f}" + (f"/{iterations:.0f}" if iterations is not None else ""))
    numbers = {key: _number(record, key) for key in _FORMATS}
    parts += [_FORMATS[key].format(value) for key, value in numbers.items() if value is not None]
    for key, prefix in (("metrics", ""), ("eval_metrics", "eval ")):
        metrics = record.get(key)
        if isinstance(metrics, Mapping):
            told = {name: _number(metrics, name) for name in metrics}
            parts += [f"{prefix}{name} {value:.4g}" for name, value in told.items() if value is not None]
    return "  ".join(parts)


def _number(record: Mapping[str, object], key: str) -> float | None:
    value = record.get(key)
    return float(value) if isinstance(value, int | float) else None
