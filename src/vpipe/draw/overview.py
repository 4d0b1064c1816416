"""All schedules side by side: what each costs at one size."""

from __future__ import annotations

from dataclasses import dataclass

from vpipe.errors import ScheduleError
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.simulate.simulate import simulate
from vpipe.schedule.traffic import traffic
from vpipe.schedule.weights import weight_usage

__all__ = ["OverviewRow", "overview", "overview_lines"]


@dataclass(frozen=True)
class OverviewRow:
    """A schedule family with its numbers on the worst rank; they are None where the family cannot run that size."""

    schedule: str
    synchronous: bool
    summary: str
    options: tuple[str, ...]
    bubble_fraction: float | None = None
    peak_activations: float | None = None
    weight_versions: int | None = None
    staleness: int | None = None
    traffic: float | None = None


def overview(num_ranks: int, num_microbatches: int) -> list[OverviewRow]:
    """Build every family with its default options, with forward = input gradient = weight gradient, and compare."""
    rows = []
    for name, entry in SCHEDULES.items():
        known = (name, entry.synchronous, entry.summary, entry.options)
        try:
            schedule = build_schedule(name, num_ranks, num_microbatches)
        except ScheduleError:
            rows.append(OverviewRow(*known))
            continue
        usage = weight_usage(schedule)
        rows.append(
            OverviewRow(
                *known,
                bubble_fraction=simulate(schedule).bubble_fraction,
                peak_activations=max(peak_activations(schedule)),
                weight_versions=max(stage.num_versions for stage in usage),
                staleness=max(max(stage.staleness) for stage in usage),
                traffic=traffic(schedule.placement),
            )
        )
    return rows


def overview_lines(rows: list[OverviewRow], num_ranks: int, num_microbatches: int) -> list[str]:
    """Lay `rows` out as a table."""
    table: list[tuple[str, ...]] = [
        ("schedule", "update", "bubble", "peak", "versions", "stale", "traffic", "what it does")
    ]
    for row in rows:
        bubble = "-" if row.bubble_fraction is None else f"{row.bubble_fraction:.1%}"
        counts = (row.peak_activations, row.weight_versions, row.staleness, row.traffic)
        numbers = ["-" if count is None else f"{count:.3g}" for count in counts]
        table.append((row.schedule, "sync" if row.synchronous else "async", bubble, *numbers, row.summary))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return [
        *lines,
        "",
        f"Bubble, peak microbatches held, weight versions and staleness on the worst of {num_ranks} ranks, for "
        f"{num_microbatches} microbatches",
        "and backward = 2 x forward. Traffic: messages between ranks, relative to one stage per rank.",
        "An asynchronous schedule fills and drains once in a run, not once per update.",
    ]
