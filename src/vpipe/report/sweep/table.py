"""What came out of a sweep as a table: CSV for other tools, and one for a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from vpipe.report.sweep.sweep import Axis, Row, short_key
from vpipe.words.units import format_bytes

__all__ = ["METRICS", "SweepMetric", "failure_lines", "find_best", "one_line", "render_table", "table_csv"]

_MOST_FAILED = 8
"""Combinations that are named for one reason."""
_WIDEST_VALUE = 24
"""Characters of a swept value that stay on one line of a terminal."""


@dataclass(frozen=True)
class SweepMetric:
    """A number of a row: its key, how a person reads it, and whether a terminal has the room for it."""

    key: str
    heading: str
    show: Callable[[float], str]
    in_terminal: bool = True


METRICS = (
    SweepMetric("samples_per_second", "samples/s", "{:.4g}".format),
    SweepMetric("iteration_ms", "ms/iter", "{:.4g}".format),
    SweepMetric("bubble_fraction", "bubble", "{:.1%}".format),
    SweepMetric("communication_share", "communication", "{:.1%}".format, in_terminal=False),
    SweepMetric("peak_memory_bytes", "memory", lambda size: format_bytes(int(size))),
    SweepMetric("predicted_memory_bytes", "memory", lambda size: format_bytes(int(size))),
    SweepMetric("final_loss", "loss", "{:.4f}".format),
    SweepMetric("eval_loss", "held-out loss", "{:.4f}".format),
)
"""Of the busiest rank, where each has its own."""


def table_csv(axes: Sequence[Axis], rows: Sequence[Row]) -> str:
    """Return CSV with a column for each axis, each number that any row has, and the folder and error of each row."""
    metrics = _present(rows)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*(axis.key for axis in axes), *(metric.key for metric in metrics), "folder", "error"])
    for row in rows:
        numbers = [row.metrics.get(metric.key) for metric in metrics]
        writer.writerow([*row.values, *numbers, row.folder, one_line(row.error)])
    return file.getvalue()


def render_table(axes: Sequence[Axis], rows: Sequence[Row]) -> Table:
    """Return a table for a rich console; the fastest row is bold, a failed one says why."""
    metrics, best = [metric for metric in _present(rows) if metric.in_terminal], find_best(rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for axis in axes:
        longest = max(map(len, (short_key(axis), *axis.values)))
        justify: Literal["right", "left"] = "right" if axis.numbers else "left"
        table.add_column(Text(short_key(axis)), justify=justify, overflow="fold", min_width=min(longest, _WIDEST_VALUE))
    for metric in metrics:
        table.add_column(metric.heading, justify="right", no_wrap=True)
    for row in rows:
        numbers = [_shown(row, metric) for metric in metrics] if row.is_done else ["failed"]
        table.add_row(*map(Text, [*row.values, *numbers]), style="bold" if row is best else None)
    return table


def failure_lines(axes: Sequence[Axis], rows: Sequence[Row]) -> list[str]:
    """Say each reason for which rows failed once, and which combinations had it."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not row.is_done:
            words = (f"{short_key(axis)}={value}" for axis, value in zip(axes, row.values, strict=True))
            reasons.setdefault(one_line(row.error), []).append("  ".join(words))
    lines = []
    for reason, combinations in reasons.items():
        lines.append(f"failed, {len(combinations)} of {len(rows)}: {reason}")
        lines += [f"  {words}" for words in combinations[:_MOST_FAILED]]
        if (more := len(combinations) - _MOST_FAILED) > 0:
            lines.append(f"  and {more} more, which the table has")
    return lines


def find_best(rows: Sequence[Row]) -> Row | None:
    """Return the row with the most samples per second, or None where none has any."""
    able = [row for row in rows if row.metrics.get("samples_per_second")]
    return max(able, key=lambda row: row.metrics["samples_per_second"] or 0.0, default=None)


def one_line(text: str) -> str:
    """Join the lines of an error."""
    return "; ".join(line.strip() for line in text.splitlines())


def _present(rows: Sequence[Row]) -> list[SweepMetric]:
    return [metric for metric in METRICS if any(row.metrics.get(metric.key) is not None for row in rows)]


def _shown(row: Row, metric: SweepMetric) -> str:
    value = row.metrics.get(metric.key)
    return "-" if value is None else metric.show(value)
