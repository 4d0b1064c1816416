"""A schedule as a picture for a slide: who does what when, and what each rank holds meanwhile.

Each panel is a schedule: ranks as rows, microbatch numbers in the cells, an upright bar where an update takes no time,
a strip below each row for warmup, steady phase and cooldown, a lower row for its link to host memory where it has one,
and below all that what each rank holds over time. Several schedules share one scale of time, so that their lengths
compare.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vpipe.draw.palette import COLOURS, GREY, HELD, INK, MOVE_COLOURS, PAPER, PHASE_COLOURS, VERSIONS
from vpipe.draw.shapes import FONT, heading, ink_on, lighten, line, path, rect, text, text_width
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.schedule import WeightRule
from vpipe.schedule.simulate.phases import PHASES, phase_spans
from vpipe.schedule.simulate.simulate import Event, Simulation
from vpipe.schedule.simulate.usage import Curve, activations_over_time, weight_versions_over_time

__all__ = ["to_svg"]

_MIN_PLOT, _MAX_PLOT = 640.0, 1800.0
_EASY_PLOT = 860.0  # wider pages are shrunk where they are shown, so cells get no more room than their labels need
_LEFT, _RIGHT, _TOP = 76.0, 120.0, 20.0
_LABEL_SIZE, _LEAST_LABEL = 12.0, 5.0
_DIGIT = 0.58  # width of a digit over the size of its font
_UPPER_STAGE = 0.35  # how much paler the last stage of a rank is than its first
_NAMES = {
    Kind.F: "forward",
    Kind.R: "recompute",
    Kind.B: "backward",
    Kind.I: "input gradient",
    Kind.W: "weight gradient",
    Kind.STEP: "update",
    Kind.OFFLOAD: "out to host memory",
    Kind.FETCH: "back",
    Kind.OFFLOAD_V: "weight version out",
    Kind.FETCH_V: "back",
}
_COLOURS = COLOURS | MOVE_COLOURS
_LINK_HEIGHT = 0.55  # of a row


@dataclass(frozen=True)
class _Page:
    """Sizes that all panels share; lengths in pixels, `scale` in pixels per unit of time."""

    scale: float
    plot: float
    row: float
    curve: float
    label: float
    """Font size of the microbatch numbers."""

    def x(self, time: float) -> float:
        return _LEFT + time * self.scale

    @property
    def width(self) -> float:
        return _LEFT + self.plot + _RIGHT


def to_svg(simulations: Sequence[Simulation], sentences: Sequence[str] = ()) -> str:
    """Return one SVG document with a panel for each of `simulations`, all on one scale of time.

    `sentences` stand beside the names, one for each: what the schedule does.
    """
    page = _page(simulations)
    body: list[str] = []
    y = _TOP
    for simulation, sentence in zip(simulations, sentences or [""] * len(simulations), strict=True):
        y = _draw_panel(body, page, simulation, sentence, y) + 26
    height = _draw_legend(body, page, simulations, y) + 30
    names = ", ".join(simulation.schedule.name for simulation in simulations)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {page.width:.0f} {height:.0f}" '
            f'width="{page.width:.0f}" height="{height:.0f}" font-family="{FONT}" role="img" '
            f'aria-label="pipeline schedules: {names}">',
            '<defs><pattern id="idle" width="6" height="6" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><rect width="6" height="6" fill="#f2f4f7"/>'
            '<line x1="0" y1="0" x2="0" y2="6" stroke="#d9dfe6" stroke-width="1.8"/></pattern></defs>',
            rect(0, 0, page.width, height, PAPER, radius=8),
            *body,
            "</svg>\n",
        ]
    )


def _page(simulations: Sequence[Simulation]) -> _Page:
    """Choose a scale at which the labels fit, or smaller labels if the page would be too wide."""
    longest = max(simulation.makespan for simulation in simulations) or 1.0
    digits = max(len(str(simulation.schedule.num_microbatches - 1)) for simulation in simulations)
    shortest = min(map(_shortest_cell, simulations))
    least, ease = (digits * _DIGIT + 0.25) * _LABEL_SIZE / shortest, 0.5 * _LABEL_SIZE / shortest
    plot = max(min(longest * (least + ease), _EASY_PLOT), longest * least)
    plot = min(max(plot, _MIN_PLOT), _MAX_PLOT)
    scale = plot / longest
    label = min(_LABEL_SIZE, (shortest * scale - 2) / (digits * _DIGIT))
    several = len(simulations) > 1
    return _Page(scale, plot, 22.0 if several else 32.0, 13.0 if several else 26.0, label)


def _shortest_cell(simulation: Simulation) -> float:
    """Return the shortest time that needs a label; what is tiny beside the longest goes without."""
    cells = [event.end - event.start for events in simulation.events for event in events]
    longest = max(cells, default=0.0)
    return min((cell for cell in cells if cell > longest / 8), default=1.0)


def _draw_panel(body: list[str], page: _Page, simulation: Simulation, sentence: str, y: float) -> float:
    """Add a panel from `y` down; return where it ends."""
    vertical = simulation.schedule.weight_rule is WeightRule.VERTICAL
    name = simulation.schedule.name + (", vertical sync" if vertical else "")
    body.append(heading(_LEFT, y + 16, name, sentence))
    body.append(text(_LEFT, y + 37, _subtitle(simulation), size=13))
    _draw_phase_names(body, page, simulation.events[0], y + 58)
    y += 64
    for rank, events in enumerate(simulation.events):
        body.append(text(_LEFT - 10, y + page.row / 2 + 4, f"rank {rank}", size=13, anchor="end"))
        body.append(rect(_LEFT, y, simulation.makespan * page.scale, page.row, "url(#idle)"))
        _draw_row(body, page, simulation, events, y, page.row)
        for phase, (start, end) in phase_spans(events).items():
            left, width = page.x(start), (end - start) * page.scale
            body.append(rect(left, y + page.row + 2, max(width - 1, 1), 3, PHASE_COLOURS[phase]))
        y += page.row + 9
        if simulation.moves[rank]:
            y = _draw_link(body, page, simulation, rank, y)
    y = _draw_axis(body, page, simulation, y)
    return _draw_curves(body, page, simulation, y)


def _subtitle(simulation: Simulation) -> str:
    schedule = simulation.schedule
    stages = schedule.placement.stages_per_rank
    peak = max(simulation.peak_activations)
    once = "" if schedule.synchronous else " (fills and drains once in a run)"
    parts = [
        f"{schedule.num_ranks} ranks" + (f" of {stages} stages" if stages > 1 else ""),
        f"{schedule.num_microbatches} microbatches",
        f"makespan {simulation.makespan:g}",
        f"bubble {simulation.bubble_fraction:.1%}{once}",
        f"at most {peak:g} microbatch{'es' if peak != 1 else ''} held",
    ]
    transfer = max((sum(hop) for hops in simulation.hops for hop in hops), default=0.0)
    if transfer:
        parts.append(f"messages take {transfer:g}")
    return "  ·  ".join(parts)


def _draw_phase_names(body: list[str], page: _Page, events: Sequence[Event], baseline: float) -> None:
    """Write the phases of the first rank above it where there is room; the strips say where they are on the others."""
    for phase, (start, end) in phase_spans(events).items():
        if (end - start) * page.scale > text_width(phase, 11):
            middle = page.x((start + end) / 2)
            body.append(text(middle, baseline, phase, size=11, fill=GREY, anchor="middle"))


def _draw_link(body: list[str], page: _Page, simulation: Simulation, rank: int, y: float) -> float:
    """Add what the host link of a rank carries; return where the next row starts."""
    height = page.row * _LINK_HEIGHT
    body.append(text(_LEFT - 10, y + height / 2 + 3, "host", size=11, fill=GREY, anchor="end"))
    _draw_row(body, page, simulation, simulation.moves[rank], y, height)
    return y + height + 8


def _draw_row(
    body: list[str], page: _Page, simulation: Simulation, events: Sequence[Event], y: float, height: float
) -> None:
    size = min(page.label, 0.9 * height)
    for action, start, end in events:
        left, width = page.x(start), (end - start) * page.scale
        tip = f"{action}, {start:g} to {end:g}"
        if action.kind is Kind.STEP and width < 3:
            continue  # drawn last, over its neighbours
        colour = _colour(simulation, action)
        gap = 1.0 if width > 4 else 0.0
        body.append(rect(left + gap / 2, y, width - gap, height, colour, radius=2 if width > 8 else 0, tip=tip))
        label = "U" if action.kind is Kind.STEP else str(action.microbatch)
        if size >= _LEAST_LABEL and width >= len(label) * _DIGIT * size + 1:
            middle, base = left + width / 2, y + height / 2 + 0.36 * size
            body.append(text(middle, base, label, size=size, fill=ink_on(colour), anchor="middle"))
    for action, start, end in events:
        if action.kind is Kind.STEP and (end - start) * page.scale < 3:
            tip = f"{action} at {end:g}"
            body.append(rect(page.x(end) - 1.75, y - 3, 3.5, height + 6, COLOURS[Kind.STEP], radius=1.5, tip=tip))


def _colour(simulation: Simulation, action: Action) -> str:
    """Return the colour of the kind; work on later stages of the rank is paler."""
    placement = simulation.schedule.placement
    if placement.stages_per_rank == 1 or action.kind is Kind.STEP:
        return _COLOURS[action.kind]
    turn = action.stage // placement.num_ranks
    return lighten(_COLOURS[action.kind], _UPPER_STAGE * turn / (placement.stages_per_rank - 1))


def _draw_axis(body: list[str], page: _Page, simulation: Simulation, y: float) -> float:
    for tick in _ticks(simulation.makespan, page.scale):
        body.append(line(page.x(tick), y - 2, page.x(tick), y + 2, GREY))
        body.append(text(page.x(tick), y + 14, f"{tick:g}", size=11, fill=GREY, anchor="middle"))
    body.append(text(_LEFT - 10, y + 14, "time", size=11, fill=GREY, anchor="end"))
    return y + 26


def _ticks(makespan: float, scale: float) -> Iterator[float]:
    least = 60 / scale
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))
    for number in range(math.floor(makespan / step + 1e-9) + 1):
        yield number * step


def _draw_curves(body: list[str], page: _Page, simulation: Simulation, y: float) -> float:
    """Add what each rank holds: an area for activations, a dashed line for weight versions where there are several."""
    held, versions = activations_over_time(simulation), weight_versions_over_time(simulation)
    top = max(value for curve in (*held, *versions) for _, value in curve)
    several = max(value for curve in versions for _, value in curve) > 1
    held_where = "held on the device" if any(simulation.moves) else "held"
    caption = f"microbatches {held_where}" + (", weight versions kept (dashed)" if several else "")
    body.append(text(_LEFT, y + 6, caption, size=11, fill=GREY))
    y += 12
    for rank, curve in enumerate(held):
        base = y + page.curve
        body.append(text(_LEFT - 10, base - 2, f"rank {rank}", size=11, fill=GREY, anchor="end"))
        points = _outline(page, curve, simulation.makespan, base, (page.curve - 3) / top)
        edge = [(page.x(0), base), *points, (page.x(simulation.makespan), base)]
        body.append(path(edge, fill=lighten(HELD, 0.72)))
        body.append(path(points, stroke=HELD, width=1.2))
        if several:
            stashed = _outline(page, versions[rank], simulation.makespan, base, (page.curve - 3) / top)
            body.append(path(stashed, stroke=VERSIONS, dashes="4 2.5", width=1.4))
        body.append(line(page.x(0), base, page.x(simulation.makespan), base, "#c9d1da", width=0.8))
        right = page.x(simulation.makespan) + 8
        label = f"{max(value for _, value in curve):g} held"
        if several:
            label += f", {max(value for _, value in versions[rank]):g} kept"
        body.append(text(right, base - 2, label, size=11, fill=GREY))
        y += page.curve + 4
    return y


def _outline(page: _Page, curve: Curve, makespan: float, base: float, unit: float) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    height = base
    for time, value in curve:
        if points:
            points.append((page.x(time), height))
        height = base - value * unit
        points.append((page.x(time), height))
    return [*points, (page.x(makespan), height)]


def _draw_legend(body: list[str], page: _Page, simulations: Sequence[Simulation], y: float) -> float:
    """Explain the colours that occur, in as many lines as they need; return where the last one starts."""
    events = [events for simulation in simulations for events in simulation.events]
    moves = [moves for simulation in simulations for moves in simulation.moves]
    kinds = {event.action.kind for rank in [*events, *moves] for event in rank}
    entries = [(14.0, _COLOURS[kind], _NAMES[kind]) for kind in _COLOURS if kind in kinds]
    if any(simulation.schedule.placement.stages_per_rank > 1 for simulation in simulations):
        entries.append((14.0, lighten(COLOURS[Kind.F], _UPPER_STAGE), "paler: later stage of the rank"))
    entries.append((14.0, "url(#idle)", "idle"))
    phases = {phase for rank in events for phase in phase_spans(rank)}
    entries += [(4.0, PHASE_COLOURS[phase], phase) for phase in PHASES if phase in phases]
    x = _LEFT
    for height, colour, name in entries:
        width = 20 + text_width(name, 12)
        if x + width > page.width - 8 and x > _LEFT:
            x, y = _LEFT, y + 22
        body.append(rect(x, y + 7 - height / 2, 14, height, colour, radius=2 if height > 4 else 0))
        body.append(text(x + 20, y + 11.5, name, size=12, fill=INK))
        x += width + 20
    return y
