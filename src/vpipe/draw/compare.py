"""Several schedules side by side: pictures on one scale of time, and their numbers in a table."""

from __future__ import annotations

from collections.abc import Sequence

from vpipe.draw.grid import Grid, columns_per_time, text_grid
from vpipe.schedule.simulate.simulate import Simulation
from vpipe.schedule.traffic import traffic
from vpipe.schedule.weights import weight_usage

__all__ = ["comparison_lines", "text_grids"]


def text_grids(simulations: Sequence[Simulation]) -> list[Grid]:
    """Draw all `simulations` on the scale of the one that needs most room."""
    scale = max(map(columns_per_time, simulations))
    return [text_grid(simulation, scale) for simulation in simulations]


def comparison_lines(simulations: Sequence[Simulation]) -> list[str]:
    """Lay the numbers of `simulations` out as a table."""
    table = [("schedule", "makespan", "bubble", "own bubble", "peak", "versions", "stale", "traffic")]
    for simulation in simulations:
        schedule = simulation.schedule
        usage = weight_usage(schedule)
        table.append(
            (
                schedule.name,
                f"{simulation.makespan:.6g}",
                f"{simulation.bubble_fraction:.1%}",
                f"{simulation.span_bubble_fraction:.1%}",
                f"{max(simulation.peak_activations):g}",
                f"{max(stage.num_versions for stage in usage)}",
                f"{max(max(stage.staleness) for stage in usage)}",
                f"{traffic(schedule.placement):.3g}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return [
        *lines,
        "",
        "Own bubble: idle between each rank's own start and end. Peak microbatches held, weight versions and staleness",
        "are the worst rank's. Traffic: messages between ranks, relative to one stage per rank.",
    ]
