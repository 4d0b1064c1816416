"""A finished run on one screen, from its `summary.json`.

Keys, all optional: `final_loss`, `eval_loss`, `samples_per_second`, `iteration_ms`, `bubble_fraction`,
`span_bubble_fraction`, `communication_share`; `bytes_sent`, `bytes_received`, `peak_memory_bytes` and
`weight_versions`, each a number or a list with one number per rank; `ranks`, a list with `rank`, `stages`, `blocks`,
`forward_ms`, `backward_ms`, `busy_share` and `waiting_share` per rank; `timeline` with `iteration`, `milliseconds` and
`rows`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vpipe.report.bubble import measure_pipeline, steady_part
from vpipe.report.timeline import draw_timeline, iteration_window
from vpipe.runtime.trace import TraceEvent

__all__ = ["render_summary", "summarize_trace"]

_MISSING = "-"
_STYLES = {"F": "blue", "R": "cyan", "B": "green", "I": "green", "W": "magenta", "U": "yellow", ".": "dim"}
_CELL = re.compile(r"\d*([FRBIWU])\d*-*|(\.)+")
_PER_RANK = ("weight_versions", "bytes_sent", "bytes_received", "peak_memory_bytes")
_COLUMNS = (
    *("rank", "stages", "blocks", "forward", "backward", "busy", "waiting"),
    *("weight versions", "sent", "received", "peak memory"),
)


def summarize_trace(events: Sequence[TraceEvent], iteration: int | None = None, width: int = 96) -> dict[str, Any]:
    """Return the part of `summary.json` that comes from measured actions of all ranks.

    `iteration` is drawn; without it the middle one of those that were recorded. Measured is the
    `steady_part`.
    """
    times = measure_pipeline(steady_part(events))
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
        return {"iteration": iteration, "milliseconds": 0.0, "rows": []}
    rows = draw_timeline(events, window, width)
    return {"iteration": iteration, "milliseconds": (window[1] - window[0]) / 1e6, "rows": rows}


def render_summary(summary: Mapping[str, Any]) -> RenderableType:
    """Return the run as tables and a picture of one iteration, for a rich console."""
    parts: list[RenderableType] = [_totals(summary)]
    if summary.get("ranks"):
        parts += [Text(), _ranks(summary)]
    if summary.get("timeline") and summary["timeline"]["rows"]:
        parts += [Text(), *_picture(summary["timeline"])]
    return Group(*parts)


def _totals(summary: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    sent, received = (_sum(summary.get(key)) for key in ("bytes_sent", "bytes_received"))
    values = {
        "final loss": _number(summary.get("final_loss"), "{:.4f}"),
        "held-out loss": _number(summary.get("eval_loss"), "{:.4f}"),
        "throughput": _number(summary.get("samples_per_second"), "{:.1f} samples/s"),
        "time per iteration": _number(summary.get("iteration_ms"), "{:.1f} ms"),
        "bubble": _number(summary.get("bubble_fraction"), "{:.1%} of all ranks' time passes without computing"),
        "communication": _number(
            summary.get("communication_share"), "{:.1%} of all ranks' time goes into waiting for other ranks"
        ),
        "messages": _MISSING if sent is None else f"{_size(sent)} sent, {_size(received)} received",
        "peak memory": _size(_largest(summary.get("peak_memory_bytes"))),
    }
    for name, value in values.items():
        if value != _MISSING:
            table.add_row(Text(name, style="bold"), Text(value))
    return table


def _ranks(summary: Mapping[str, Any]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name in ("stages", "blocks") else "right")
    for index, row in enumerate(summary["ranks"]):
        versions, sent, received, memory = (_of_rank(row, summary, key, index) for key in _PER_RANK)
        table.add_row(
            str(row.get("rank", index)),
            " ".join(map(str, row.get("stages", []))) or _MISSING,
            _blocks(row.get("blocks")),
            _number(row.get("forward_ms"), "{:.2f} ms"),
            _number(row.get("backward_ms"), "{:.2f} ms"),
            _number(row.get("busy_share"), "{:.0%}"),
            _number(row.get("waiting_share"), "{:.0%}"),
            _number(versions, "{}"),
            _size(sent),
            _size(received),
            _size(memory),
        )
    return table


def _picture(timeline: Mapping[str, Any]) -> list[RenderableType]:
    head = f"iteration {timeline['iteration']}, {timeline['milliseconds']:.1f} ms"
    lines: list[RenderableType] = [
        Text.assemble((head, "bold"), "   F forward, B backward, U update, . waiting for another rank"),
    ]
    for rank, row in enumerate(timeline["rows"]):
        line = Text(f"rank {rank} ", no_wrap=True, overflow="crop")
        line.append(_coloured(row))
        lines.append(line)
    return lines


def _coloured(row: str) -> Text:
    text = Text(row)
    for match in _CELL.finditer(row):
        text.stylize(_STYLES[match[1] or match[2]], *match.span())
    return text


def _blocks(blocks: Any) -> str:
    if not blocks:
        return _MISSING
    return f"{blocks[0]} to {blocks[-1]}" if blocks[0] != blocks[-1] else str(blocks[0])


def _of_rank(row: Mapping[str, Any], summary: Mapping[str, Any], key: str, index: int) -> Any:
    values = summary.get(key)
    if key not in row and isinstance(values, list) and index < len(values):
        return values[index]
    return row.get(key)


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
