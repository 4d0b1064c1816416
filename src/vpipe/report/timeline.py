"""One iteration as a picture of text: what every rank did, drawn to scale.

Cells look like those of `vpipe schedule`: ``F3---`` is the forward of microbatch 3, B its backward, U an update, with
the stage in front where a rank has several. Dots are waiting for a message, blanks everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vpipe.draw.palette import MARKS
from vpipe.runtime.trace import TraceEvent
from vpipe.schedule.action import COMPUTE, Action

__all__ = ["draw_timeline", "iteration_window"]

WAIT = "."


def iteration_window(events: Iterable[TraceEvent], iteration: int) -> tuple[int, int] | None:
    """Return the first start and the last end, in ns, of an iteration on any rank; None where it has no events."""
    times = [(event.start_ns, event.end_ns) for event in events if event.iteration == iteration]
    return (min(start for start, _ in times), max(end for _, end in times)) if times else None


def draw_timeline(events: Sequence[TraceEvent], window: tuple[int, int], width: int = 96) -> list[str]:
    """Draw what happened between two times, in ns: one row of `width` characters per rank.

    In asynchronous runs microbatches of neighbouring iterations are in the picture too.
    """
    start, end = window
    scale = width / max(1, end - start)
    stages = {event.rank: {item.action.stage for item in events if item.rank == event.rank} for event in events}
    rows = {rank: [" "] * width for rank in sorted(stages)}
    for event in sorted(events, key=lambda item: item.start_ns):
        columns = [
            min(max(round((time - start) * scale), 0), width)
            for time in (event.start_ns, event.start_ns + event.wait_ns, event.end_ns)
        ]
        row, (first, middle, last) = rows[event.rank], columns
        row[first:middle] = WAIT * (middle - first)
        if event.action.kind in COMPUTE:
            row[middle:last] = _cell(event.action, len(stages[event.rank]) > 1, last - middle)
    return ["".join(row) for row in rows.values()]


def _cell(action: Action, with_stage: bool, width: int) -> str:
    letter = MARKS.get(action.kind, action.kind.value)
    label = f"{action.stage if with_stage else ''}{letter}{action.microbatch}"
    if len(label) > width:
        label = letter
    return label.ljust(width, "-")[:width]
