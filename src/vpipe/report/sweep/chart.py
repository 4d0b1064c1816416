"""What came out of a sweep as an SVG: the first setting along the bottom, a line for each value of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vpipe.draw.palette import GREY, GRID, INK, PAPER, SERIES
from vpipe.draw.shapes import FONT, line, path, rect, text, text_width
from vpipe.report.sweep.sweep import Axis, Row, short_key

__all__ = ["draw_chart"]

_DASHES = ("", "6 4", "2 3")
_WIDTH, _LEFT, _RIGHT, _TOP = 760.0, 74.0, 24.0, 24.0
_HEIGHT, _GAP = 190.0, 66.0
_MIB = 1024.0**2
_LINES_ALIKE, _DOTS_ALIKE = 2.0, 7.0
"""Pixels under which two lines, and two dots, cover each other."""
_TURN, _ASIDE = 7.0, 9.0
"""Of lines that cover each other: the length for which each is seen in turn; of dots: how far apart they stand."""
_MOST_FAILED = 8
"""Lines of the legend that name what failed."""


@dataclass(frozen=True)
class _Panel:
    """One number over the first setting; `from_zero` where its size counts, not only its changes."""

    key: str
    name: str
    unit: float = 1.0
    from_zero: bool = True


_PANELS = (
    _Panel("samples_per_second", "samples per second"),
    _Panel("peak_memory_bytes", "peak memory of the largest rank, MiB", _MIB),
    _Panel("predicted_memory_bytes", "predicted memory of the largest rank, MiB", _MIB),
    _Panel("final_loss", "final loss", from_zero=False),
)


@dataclass(frozen=True, eq=False)
class _Series:
    name: str
    colour: str
    dashes: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class _Dot:
    y: float
    tip: str


def draw_chart(axes: Sequence[Axis], rows: Sequence[Row]) -> str:
    """Return one SVG document with a panel for throughput, memory and loss each, as far as any row has them.

    Values of the first axis stand side by side in the order in which they were given; neighbours that are numbers are
    joined by lines. Where series are equal their dots stand side by side and their lines take turns. Combinations that
    failed are crosses on the bottom line, and named in the legend.
    """
    series = _series(axes, rows)
    panels = [panel for panel in _PANELS if any(row.metrics.get(panel.key) is not None for row in rows)]
    failed = sorted({axes[0].values.index(row.values[0]) for row in rows if not row.is_done})
    body: list[str] = []
    y = _TOP
    for panel in panels:
        _draw_panel(body, panel, axes[0], series, y)
        for index in failed:
            body += _cross(_x(axes[0], index), y + _HEIGHT, GREY)
        y += _HEIGHT + _GAP
    height = _draw_legend(body, series, _failures(axes, rows), y) + 24
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" width="{_WIDTH:.0f}" '
        f'height="{height:.0f}" font-family="{FONT}" role="img" aria-label="sweep">'
    )
    return "\n".join([head, rect(0, 0, _WIDTH, height, PAPER, radius=8), *body, "</svg>\n"])


def _series(axes: Sequence[Axis], rows: Sequence[Row]) -> list[_Series]:
    """Group rows that are done by what they have of all axes but the first."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.is_done:
            groups.setdefault(row.values[1:], []).append(row)
    found = []
    for index, (values, own) in enumerate(groups.items()):
        name = _name(axes[1:], values)
        dashes = _DASHES[index // len(SERIES) % len(_DASHES)]
        found.append(_Series(name, SERIES[index % len(SERIES)], dashes, tuple(own)))
    return found


def _name(axes: Sequence[Axis], values: Sequence[str]) -> str:
    return "  ".join(f"{short_key(axis)}={value}" for axis, value in zip(axes, values, strict=True))


def _failures(axes: Sequence[Axis], rows: Sequence[Row]) -> list[str]:
    """Name what failed, by the choices of all axes but the first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if not row.is_done:
            groups.setdefault(row.values[1:], []).append(row.values[0])
    found = [
        "  ".join(filter(None, [f"{short_key(axes[0])}={', '.join(first)}", _name(axes[1:], values)]))
        for values, first in groups.items()
    ]
    more = len(found) - _MOST_FAILED
    return found if more <= 0 else [*found[:_MOST_FAILED], f"and {more} more"]


def _draw_panel(body: list[str], panel: _Panel, axis: Axis, series: Sequence[_Series], y: float) -> None:
    values = [value / panel.unit for one in series for row in one.rows if (value := row.metrics.get(panel.key))]
    ticks = list(_ticks(0.0 if panel.from_zero else min(values, default=0.0), max(values, default=1.0)))
    base, low, high = y + _HEIGHT, ticks[0], ticks[-1]

    def height(value: float) -> float:
        return base - (value - low) / (high - low) * (_HEIGHT - 26)

    body.append(text(_LEFT, y + 8, panel.name, size=14))
    for tick in ticks:
        body.append(line(_LEFT, height(tick), _WIDTH - _RIGHT, height(tick), GRID))
        body.append(text(_LEFT - 8, height(tick) + 4, f"{tick:g}", size=11, fill=GREY, anchor="end"))
    body.append(line(_LEFT, base, _WIDTH - _RIGHT, base, GREY))
    _draw_values(body, axis, base)
    found = {one.name: _dots(panel, axis, one, height) for one in series}
    if axis.numbers:
        _draw_lines(body, axis, series, found)
    _draw_dots(body, axis, series, found)


def _draw_values(body: list[str], axis: Axis, base: float) -> None:
    room = (_WIDTH - _LEFT - _RIGHT) / len(axis.values) - 6
    for index, value in enumerate(axis.values):
        shown = value
        while len(shown) > 2 and text_width(shown, 12) > room:
            shown = shown.rstrip("…")[:-1] + "…"
        body.append(text(_x(axis, index), base + 17, shown, size=12, anchor="middle"))
    body.append(text((_LEFT + _WIDTH - _RIGHT) / 2, base + 35, axis.key, size=12, fill=GREY, anchor="middle"))


def _dots(panel: _Panel, axis: Axis, one: _Series, height: Callable[[float], float]) -> dict[int, _Dot]:
    """Return where the series is at each value of the axis that it has."""
    dots = {}
    for row in one.rows:
        value = row.metrics.get(panel.key)
        if value is not None:
            size = value / panel.unit
            tip = "  ".join(filter(None, [f"{short_key(axis)}={row.values[0]}", one.name]))
            dots[axis.values.index(row.values[0])] = _Dot(height(size), f"{tip}: {size:.4g}")
    return dots


def _draw_lines(body: list[str], axis: Axis, series: Sequence[_Series], found: Mapping[str, dict[int, _Dot]]) -> None:
    """Join neighbouring values of each series; what is missing between two is not passed over."""
    for index in range(len(axis.values) - 1):
        ends = {
            one: (found[one.name][index].y, found[one.name][index + 1].y)
            for one in series
            if {index, index + 1} <= found[one.name].keys()
        }
        for group in _alike(ends, _LINES_ALIKE):
            points = [(_x(axis, index), ends[group[0]][0]), (_x(axis, index + 1), ends[group[0]][1])]
            if len(group) == 1:
                body.append(path(points, stroke=group[0].colour, dashes=group[0].dashes, width=2))
            else:
                _draw_in_turns(body, points[0], points[1], [one.colour for one in group])


def _draw_in_turns(
    body: list[str], start: tuple[float, float], end: tuple[float, float], colours: Sequence[str]
) -> None:
    """Draw one line in several colours, which take turns."""
    count = max(len(colours), round(math.dist(start, end) / _TURN))
    points = [
        (start[0] + (end[0] - start[0]) * part / count, start[1] + (end[1] - start[1]) * part / count)
        for part in range(count + 1)
    ]
    for number, piece in enumerate(pairwise(points)):
        body.append(path(list(piece), stroke=colours[number % len(colours)], width=2))


def _draw_dots(body: list[str], axis: Axis, series: Sequence[_Series], found: Mapping[str, dict[int, _Dot]]) -> None:
    """Draw the values; dots that would cover each other stand side by side."""
    room = (_WIDTH - _LEFT - _RIGHT) / len(axis.values)
    for index in range(len(axis.values)):
        here = {one: (found[one.name][index].y,) for one in series if index in found[one.name]}
        for group in _alike(here, _DOTS_ALIKE):
            step = min(_ASIDE, room / len(group))
            for number, one in enumerate(group):
                dot = found[one.name][index]
                x = _x(axis, index) + (number - (len(group) - 1) / 2) * step
                body.append(rect(x - 4, dot.y - 4, 8, 8, one.colour, radius=4, tip=dot.tip))


def _alike(heights: Mapping[_Series, tuple[float, ...]], within: float) -> list[list[_Series]]:
    """Group series that are less than `within` apart."""
    groups: list[list[_Series]] = []
    for one, own in heights.items():
        for group in groups:
            if all(abs(x - y) < within for x, y in zip(own, heights[group[0]], strict=True)):
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def _x(axis: Axis, index: int) -> float:
    return _LEFT + (index + 0.5) * (_WIDTH - _LEFT - _RIGHT) / len(axis.values)


def _ticks(low: float, high: float) -> Iterator[float]:
    """Yield four to eight round numbers, from one not above `low` to one not below `high`."""
    spread = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if spread / (power * factor) <= 6)
    first = math.floor(low / step + 1e-9)
    for number in range(first, max(math.ceil(high / step - 1e-9), first + 1) + 1):
        yield round(number * step, 12)


def _draw_legend(body: list[str], series: Sequence[_Series], failures: Sequence[str], y: float) -> float:
    """Name the series, in as many lines as they need, and what failed; return where the last line is."""
    x = _LEFT
    for one in series:
        width = 40 + text_width(one.name, 12)
        if not one.name:
            continue
        if x + width > _WIDTH - _RIGHT and x > _LEFT:
            x, y = _LEFT, y + 20
        body.append(path([(x, y - 4), (x + 22, y - 4)], stroke=one.colour, dashes=one.dashes, width=2))
        body.append(rect(x + 7, y - 8, 8, 8, one.colour, radius=4))
        body.append(text(x + 28, y, one.name, size=12, fill=INK))
        x += width + 18
    for number, words in enumerate(["failed: the table says why", *failures] if failures else []):
        y += 20
        if not number:
            body += _cross(_LEFT + 11, y - 4, GREY)
        body.append(text(_LEFT + 28, y, words, size=12, fill=GREY if number else INK))
    return y


def _cross(x: float, y: float, colour: str) -> list[str]:
    ends = [[(x - 4, y - 4), (x + 4, y + 4)], [(x - 4, y + 4), (x + 4, y - 4)]]
    return [path(points, stroke=colour, width=2) for points in ends]
