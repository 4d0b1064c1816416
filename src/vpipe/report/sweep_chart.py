"""What came out of a sweep as an SVG: the first setting along the bottom, a line for each value of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vpipe.report.sweep import Axis, Row, short_key
from vpipe.schedule.svg_shapes import GREY, INK, line, path, rect, text, text_width

__all__ = ["draw_chart"]

_FONT = "Inter,'Helvetica Neue',Helvetica,Arial,'Liberation Sans','DejaVu Sans',sans-serif"
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1b2430")
_DASHES = ("", "6 4", "2 3")
_WIDTH, _LEFT, _RIGHT, _TOP = 760.0, 74.0, 24.0, 24.0
_HEIGHT, _GAP = 190.0, 66.0
_MIB = 1024.0**2


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


@dataclass(frozen=True)
class _Series:
    name: str
    colour: str
    dashes: str
    rows: tuple[Row, ...]


def draw_chart(axes: Sequence[Axis], rows: Sequence[Row]) -> str:
    """Return one SVG document with a panel for throughput, memory and loss each, as far as any row has them.

    Values of the first axis stand side by side in the order in which they were given; numbers are joined by lines.
    Combinations that failed are crosses on the bottom line.
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
    height = _draw_legend(body, series, bool(failed), y) + 24
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" width="{_WIDTH:.0f}" '
        f'height="{height:.0f}" font-family="{_FONT}" role="img" aria-label="sweep">'
    )
    return "\n".join([head, rect(0, 0, _WIDTH, height, "#ffffff", radius=8), *body, "</svg>\n"])


def _series(axes: Sequence[Axis], rows: Sequence[Row]) -> list[_Series]:
    """Group rows that are done by what they have of all axes but the first."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.is_done:
            groups.setdefault(row.values[1:], []).append(row)
    found = []
    for index, (values, own) in enumerate(groups.items()):
        name = "  ".join(f"{short_key(axis)}={value}" for axis, value in zip(axes[1:], values, strict=True))
        dashes = _DASHES[index // len(_COLOURS) % len(_DASHES)]
        found.append(_Series(name, _COLOURS[index % len(_COLOURS)], dashes, tuple(own)))
    return found


def _draw_panel(body: list[str], panel: _Panel, axis: Axis, series: Sequence[_Series], y: float) -> None:
    values = [value / panel.unit for one in series for row in one.rows if (value := row.metrics.get(panel.key))]
    ticks = list(_ticks(0.0 if panel.from_zero else min(values, default=0.0), max(values, default=1.0)))
    base, low, high = y + _HEIGHT, ticks[0], ticks[-1]

    def height(value: float) -> float:
        return base - (value - low) / (high - low) * (_HEIGHT - 26)

    body.append(text(_LEFT, y + 8, panel.name, size=14))
    for tick in ticks:
        body.append(line(_LEFT, height(tick), _WIDTH - _RIGHT, height(tick), "#e3e8ee"))
        body.append(text(_LEFT - 8, height(tick) + 4, f"{tick:g}", size=11, fill=GREY, anchor="end"))
    body.append(line(_LEFT, base, _WIDTH - _RIGHT, base, GREY))
    _draw_values(body, axis, base)
    for one in series:
        _draw_series(body, panel, axis, one, height)


def _draw_values(body: list[str], axis: Axis, base: float) -> None:
    room = (_WIDTH - _LEFT - _RIGHT) / len(axis.values) - 6
    for index, value in enumerate(axis.values):
        shown = value
        while len(shown) > 2 and text_width(shown, 12) > room:
            shown = shown.rstrip("…")[:-1] + "…"
        body.append(text(_x(axis, index), base + 17, shown, size=12, anchor="middle"))
    body.append(text((_LEFT + _WIDTH - _RIGHT) / 2, base + 35, axis.key, size=12, fill=GREY, anchor="middle"))


def _draw_series(body: list[str], panel: _Panel, axis: Axis, one: _Series, height: Callable[[float], float]) -> None:
    dots = []
    for row in one.rows:
        value = row.metrics.get(panel.key)
        if value is not None:
            size = value / panel.unit
            x = _x(axis, axis.values.index(row.values[0]))
            dots.append((x, height(size), f"{short_key(axis)}={row.values[0]}  {one.name}: {size:.4g}"))
    if axis.numbers and len(dots) > 1:
        body.append(path([(x, y) for x, y, _ in dots], stroke=one.colour, dashes=one.dashes, width=2))
    for x, y, tip in dots:
        body.append(rect(x - 4, y - 4, 8, 8, one.colour, radius=4, tip=tip))


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


def _draw_legend(body: list[str], series: Sequence[_Series], has_failed: bool, y: float) -> float:
    """Name the series, in as many lines as they need, and crosses; return where the last line is."""
    x = _LEFT
    for one in series if len(series) > 1 else ():
        width = 40 + text_width(one.name, 12)
        if x + width > _WIDTH - _RIGHT and x > _LEFT:
            x, y = _LEFT, y + 20
        body.append(path([(x, y - 4), (x + 22, y - 4)], stroke=one.colour, dashes=one.dashes, width=2))
        body.append(rect(x + 7, y - 8, 8, 8, one.colour, radius=4))
        body.append(text(x + 28, y, one.name, size=12, fill=INK))
        x += width + 18
    if has_failed:
        y += 20
        body += _cross(_LEFT + 11, y - 4, GREY)
        body.append(text(_LEFT + 28, y, "failed: the table says why", size=12, fill=INK))
    return y


def _cross(x: float, y: float, colour: str) -> list[str]:
    ends = [[(x - 4, y - 4), (x + 4, y + 4)], [(x - 4, y + 4), (x + 4, y - 4)]]
    return [path(points, stroke=colour, width=2) for points in ends]
