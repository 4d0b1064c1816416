"""The few SVG elements that a picture of a schedule or a chart needs."""

from __future__ import annotations

from html import escape

from vpipe.draw.palette import GREY, INK, PAPER

__all__ = [
    "FONT",
    "heading",
    "ink_on",
    "lighten",
    "line",
    "path",
    "rect",
    "text",
    "text_width",
]

FONT = "Inter,'Helvetica Neue',Helvetica,Arial,'Liberation Sans','DejaVu Sans',sans-serif"


def rect(x: float, y: float, width: float, height: float, fill: str, *, radius: float = 0, tip: str = "") -> str:
    """Return a filled rectangle; `tip` shows when the mouse rests on it."""
    corner = f' rx="{_number(radius)}"' if radius else ""
    head = f'<rect x="{_number(x)}" y="{_number(y)}" width="{_number(width)}" height="{_number(height)}"'
    body = f"><title>{escape(tip)}</title></rect>" if tip else "/>"
    return f'{head}{corner} fill="{fill}"{body}'


def text(x: float, y: float, words: str, *, size: float, fill: str = INK, anchor: str = "start") -> str:
    """Return a line of text whose baseline is at `y`."""
    place = f'x="{_number(x)}" y="{_number(y)}"' + ("" if anchor == "start" else f' text-anchor="{anchor}"')
    return f'<text {place} font-size="{_number(size)}" fill="{fill}">{escape(words)}</text>'


def heading(x: float, y: float, name: str, sentence: str) -> str:
    """Return a large name with a sentence beside it."""
    beside = f'<tspan dx="12" font-size="13" fill="{GREY}">{escape(sentence)}</tspan>' if sentence else ""
    bold = f'<tspan font-weight="600">{escape(name)}</tspan>'
    return f'<text x="{_number(x)}" y="{_number(y)}" font-size="20" fill="{INK}">{bold}{beside}</text>'


def text_width(words: str, size: float) -> float:
    """Estimate how wide `words` are, in any common sans-serif font."""
    return size * sum(0.3 if letter in "fijlrt.,:;()I1 " else 0.85 if letter in "mwMW%" else 0.56 for letter in words)


def line(x1: float, y1: float, x2: float, y2: float, stroke: str, *, width: float = 1) -> str:
    """Return a straight line."""
    ends = f'x1="{_number(x1)}" y1="{_number(y1)}" x2="{_number(x2)}" y2="{_number(y2)}"'
    return f'<line {ends} stroke="{stroke}" stroke-width="{_number(width)}"/>'


def path(
    points: list[tuple[float, float]], *, fill: str = "none", stroke: str = "none", dashes: str = "", width: float = 1.5
) -> str:
    """Return straight lines through `points`."""
    steps = "L".join(f"{_number(x)} {_number(y)}" for x, y in points)
    pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
    edge = f' stroke-width="{_number(width)}"' if stroke != "none" else ""
    return f'<path d="M{steps}" fill="{fill}" stroke="{stroke}"{edge}{pattern}/>'


def lighten(colour: str, share: float) -> str:
    """Mix `colour` (#rrggbb) with a share of white."""
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in _parts(colour))


def ink_on(colour: str) -> str:
    """Return the text colour that reads best on `colour`."""
    red, green, blue = _parts(colour)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 125 else PAPER


def _parts(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
