"""A finished run on one screen, from its `summary.json`.

Keys, all optional: `final_loss`, `eval_loss`, `samples_per_second`, `iteration_ms`, `bubble_fraction`,
`span_bubble_fraction`, `communication_share`; `bytes_sent`, `bytes_received`, `peak_memory_bytes` and
`weight_versions`, each a number or a list with one number per rank; `ranks`, a list with `rank`, `stages`, `blocks`,
`forward_ms`, `backward_ms`, `busy_share` and `waiting_share` per rank; `timeline` with `iteration`, `milliseconds` and
`rows`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from vpipe.report.bubble import measure_pipeline
from vpipe.report.timeline import draw_timeline, iteration_window
from vpipe.runtime.trace import TraceEvent

__all__ = ["render_summary", "summarize_trace"]

_MISSING = "-"
_STYLES = {"F": "blue", "R": "cyan", "B": "green", "I": "green", "W": "magenta", "U": "yellow", ".": "dim"}
_CELL = re.compile(r"\d*([FRBIWU])\d*-*|(\.)+")
_STORED_WIDTH = 72
_LARGEST_WIDTH = 200
_GAP = "  "


def summarize_trace(
    events: Sequence[TraceEvent],
    measured: Sequence[TraceEvent],
    iteration: int | None = None,
    width: int = _STORED_WIDTH,
) -> dict[str, Any]:
    """Return the part of `summary.json` that comes from actions of all ranks.

    Shares and times are those of `measured`. Of `events` the iteration `iteration` is drawn, counted from 0 as in the
    events; without it the middle one of those that were recorded. The summary counts iterations from 1.
    """
    times = measure_pipeline(measured)
    rows = []
    for rank in times.ranks:
        stages = [stage for stage in times.stages if stage.rank == rank.rank]
        rows.append(
            {
                "rank": rank.rank,
                "stages": [stage.stage for stage in stages],
                "forward_ms": sum(stage.forward_ms for stage in stages),
                "backward_ms": sum(stage.backward_ms for stage in stages),
                "busy_share": rank.busy_ms / times.makespan_ms if times.makespan_ms else 0.0,
                "waiting_share": rank.waiting_ms / times.makespan_ms if times.makespan_ms else 0.0,
            }
        )
    summary: dict[str, Any] = {
        "bubble_fraction": times.bubble_fraction,
        "span_bubble_fraction": times.span_bubble_fraction,
        "communication_share": times.communication_share,
        "ranks": rows,
    }
    recorded = sorted({event.iteration for event in events})
    if recorded:
        drawn = recorded[len(recorded) // 2] if iteration is None else iteration
        summary["timeline"] = _timeline(events, drawn, width)
    return summary


def _timeline(events: Sequence[TraceEvent], iteration: int, width: int) -> dict[str, Any]:
    window = iteration_window(events, iteration)
    if window is None:
        return {"iteration": iteration + 1, "milliseconds": 0.0, "rows": []}
    rows = draw_timeline(events, window, width)
    return {"iteration": iteration + 1, "milliseconds": (window[1] - window[0]) / 1e6, "rows": rows}


def render_summary(summary: Mapping[str, Any], events: Sequence[TraceEvent] = ()) -> RenderableType:
    """Return the run as tables and a picture of one iteration, for a rich console of any width from 80 on.

    The picture is drawn anew from `events` where they are given, as wide as the console.
    """
    return _Screen(summary, events)


@dataclass(frozen=True)
class _Screen:
    summary: Mapping[str, Any]
    events: Sequence[TraceEvent]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        parts = [_totals(self.summary), *_rank_tables(self.summary, options.max_width)]
        if timeline := self.summary.get("timeline"):
            parts.append(_picture(timeline, self.events, options.max_width))
        lines = [line for index, part in enumerate(filter(None, parts)) for line in ([Text()] if index else []) + part]
        for line in lines:
            line.no_wrap, line.overflow = True, "crop"
        yield Group(*lines)


def _totals(summary: Mapping[str, Any]) -> list[Text]:
    sent, received = (_sum(summary.get(key)) for key in ("bytes_sent", "bytes_received"))
    values = {
        "final loss": _number(summary.get("final_loss"), "{:.4f}"),
        "held-out loss": _number(summary.get("eval_loss"), "{:.4f}"),
        "throughput": _number(summary.get("samples_per_second"), "{:.1f} samples/s"),
        "time per iteration": _number(summary.get("iteration_ms"), "{:.1f} ms"),
        "predicted": _prediction(summary.get("prediction")),
        "bubble": _number(summary.get("bubble_fraction"), "{:.1%} of all ranks' time passes without computing"),
        "communication": _number(
            summary.get("communication_share"), "{:.1%} of all ranks' time goes into waiting for others"
        ),
        "messages": _MISSING if sent is None else f"{_size(sent)} sent, {_size(received)} received",
        "peak memory": _size(_largest(summary.get("peak_memory_bytes"))),
    }
    width = max(map(len, values)) + len(_GAP)
    return [Text.assemble((name.ljust(width), "bold"), value) for name, value in values.items() if value != _MISSING]


def _prediction(given: Any) -> str:
    """Say how far a plan and the run were apart, in time and on the rank where memory was furthest off."""
    if not given:
        return _MISSING
    step = given["step_ms"]
    words = f"{step['predicted']:.1f} ms ({_number(step['error'], '{:+.1%}')})"
    ranks = [rank for rank in given.get("memory_bytes", []) if rank["error"] is not None]
    if not ranks:
        return words
    worst = max(ranks, key=lambda rank: abs(rank["error"]))
    return f"{words}; memory at worst {_size(worst['predicted'])} ({worst['error']:+.1%})"


@dataclass(frozen=True)
class _Column:
    name: str
    cell: Callable[[Mapping[str, Any]], str]
    left: bool = False


_RANK = _Column("rank", lambda row: str(row["rank"]))
_WORK = (
    _Column("stages", lambda row: " ".join(map(str, row.get("stages", []))) or _MISSING, left=True),
    _Column("blocks", lambda row: _blocks(row.get("blocks")), left=True),
    _Column("forward", lambda row: _number(row.get("forward_ms"), "{:.2f} ms")),
    _Column("backward", lambda row: _number(row.get("backward_ms"), "{:.2f} ms")),
    _Column("busy", lambda row: _number(row.get("busy_share"), "{:.0%}")),
    _Column("waiting", lambda row: _number(row.get("waiting_share"), "{:.0%}")),
)
_HELD = (
    _Column("weight versions", lambda row: _number(row.get("weight_versions"), "{}")),
    _Column("sent", lambda row: _size(row.get("bytes_sent"))),
    _Column("received", lambda row: _size(row.get("bytes_received"))),
    _Column("peak memory", lambda row: _size(row.get("peak_memory_bytes"))),
)
_PER_RANK = ("weight_versions", "bytes_sent", "bytes_received", "peak_memory_bytes")


def _rank_tables(summary: Mapping[str, Any], width: int) -> list[list[Text]]:
    """Return one table with everything about each rank, or two where the console is too narrow for it."""
    rows = []
    for index, given in enumerate(summary.get("ranks", [])):
        lists = {key: summary[key] for key in _PER_RANK if isinstance(summary.get(key), list)}
        of_rank = {key: values[index] for key, values in lists.items() if index < len(values)}
        rows.append({"rank": index, **of_rank, **given})
    if not rows:
        return []
    whole = _table((_RANK, *_WORK, *_HELD), rows)
    if max(len(line) for line in whole) <= width:
        return [whole]
    return [_table((_RANK, *_WORK), rows), _table((_RANK, *_HELD), rows)]


def _table(columns: Sequence[_Column], rows: Sequence[Mapping[str, Any]]) -> list[Text]:
    cells = [[column.name for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = []
    for line in cells:
        fitted = [
            cell.ljust(width) if column.left else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ]
        lines.append(Text(_GAP.join(fitted).rstrip(), "bold" if line is cells[0] else ""))
    return lines


def _picture(timeline: Mapping[str, Any], events: Sequence[TraceEvent], width: int) -> list[Text]:
    rows, names = list(timeline["rows"]), [f"rank {rank} " for rank in range(len(timeline["rows"]))]
    if not rows:
        return []
    window = iteration_window(events, timeline["iteration"] - 1)
    if window is not None:
        rows = draw_timeline(events, window, min(width, _LARGEST_WIDTH) - max(map(len, names)))
    head = f"iteration {timeline['iteration']}, {timeline['milliseconds']:.1f} ms"
    lines = [Text.assemble((head, "bold"), "   F forward, B backward, U update, . waiting")]
    for name, row in zip(names, rows, strict=True):
        lines.append(Text(name.ljust(max(map(len, names)))).append(_coloured(row.rstrip())))
    return lines


def _coloured(row: str) -> Text:
    text = Text(row)
    for match in _CELL.finditer(row):
        text.stylize(_STYLES[match[1] or match[2]], *match.span())
    return text


def _blocks(blocks: Any) -> str:
    """Write runs of consecutive numbers as such; a rank with several stages has several."""
    runs: list[list[int]] = []
    for block in blocks or ():
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    shown = [f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(shown[:2] + ["..."] * (len(shown) > 2)) or _MISSING


def _number(value: Any, form: str) -> str:
    return _MISSING if value is None else form.format(value)


def _sum(value: Any) -> Any:
    return sum(value) if isinstance(value, list) else value


def _largest(value: Any) -> Any:
    return max(value, default=None) if isinstance(value, list) else value


def _size(num_bytes: Any) -> str:
    if num_bytes is None:
        return _MISSING
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
