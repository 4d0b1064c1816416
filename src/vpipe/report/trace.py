"""Measured actions as a timeline for Perfetto (ui.perfetto.dev) or chrome://tracing.

The format is Chrome's Trace Event Format: complete events (`"ph": "X"`), times in microseconds, one row per rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vpipe.draw.chrome_trace import name_row, slice_of
from vpipe.runtime.trace import TraceEvent
from vpipe.schedule.action import Action

__all__ = ["build_timeline", "read_timeline", "write_timeline"]

_WAIT = "wait"
_WAIT_COLOUR = "grey"


def build_timeline(events: Iterable[TraceEvent]) -> dict[str, Any]:
    """Return the trace as the object that `timeline.json` holds; time 0 is the first start, iterations count from 1."""
    ordered = sorted(events, key=lambda event: (event.rank, event.start_ns))
    origin = min((event.start_ns for event in ordered), default=0)
    rows: list[dict[str, Any]] = []
    for rank in sorted({event.rank for event in ordered}):
        rows += name_row(0, rank, f"rank {rank}")
    for event in ordered:
        rows += _slices(event, origin)
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def write_timeline(path: Path, events: Iterable[TraceEvent]) -> None:
    """Write the trace to `path`."""
    path.write_text(json.dumps(build_timeline(events), separators=(",", ":")), encoding="utf-8")


def read_timeline(path: Path) -> list[TraceEvent]:
    """Read the events of a file that `write_timeline` wrote; an action that began with waiting comes back as two."""
    slices = [row for row in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if row["ph"] == "X"]
    events = []
    for row in slices:
        start, duration = round(row["ts"] * 1e3), round(row["dur"] * 1e3)
        action = Action.parse(row["args"]["action"])
        wait = duration if row["cat"] == _WAIT else 0
        events.append(TraceEvent(row["tid"], action, row["args"]["iteration"] - 1, start, start + duration, wait))
    return events


def _slices(event: TraceEvent, origin: int) -> list[dict[str, Any]]:
    """Return what waiting the action began with, if any, and then the work itself, if any."""
    action, middle = event.action, event.start_ns + event.wait_ns
    more = {"iteration": event.iteration + 1, "wait_ms": event.wait_ns / 1e6}
    parts = []
    if event.wait_ns:
        waiting = slice_of(action, (event.start_ns - origin) / 1e3, event.wait_ns / 1e3, event.rank, more=more)
        name = f"wait {action.kind}{action.microbatch}"
        parts.append({**waiting, "name": name, "cat": _WAIT, "cname": _WAIT_COLOUR})
    if event.work_ns or not event.wait_ns:
        parts.append(slice_of(action, (middle - origin) / 1e3, event.work_ns / 1e3, event.rank, more=more))
    return parts
