"""What kinds of actions are called and which colours they have, in every picture: on paper, in a terminal, in a trace.

Colours on paper are those of Okabe and Ito ("Color Universal Design", 2008), which people with any colour vision tell
apart.
"""

from __future__ import annotations

from vpipe.schedule.action import Kind

__all__ = [
    "COLOURS",
    "GREY",
    "GRID",
    "HELD",
    "INK",
    "MARKS",
    "MOVE_COLOURS",
    "NAMES",
    "PAPER",
    "PHASE_COLOURS",
    "SERIES",
    "TERMINAL_COLOURS",
    "TRACE_COLOURS",
    "VERSIONS",
]

NAMES = {
    Kind.F: "forward",
    Kind.R: "recompute",
    Kind.B: "backward",
    Kind.I: "input gradient",
    Kind.W: "weight gradient",
    Kind.STEP: "update",
    Kind.OFFLOAD: "out to host memory",
    Kind.FETCH: "back from host memory",
    Kind.OFFLOAD_V: "weights out to host memory",
    Kind.FETCH_V: "weights back from host memory",
}
MARKS = {Kind.STEP: "U", Kind.OFFLOAD: ">", Kind.FETCH: "<", Kind.OFFLOAD_V: "}", Kind.FETCH_V: "{"}
"""What stands in a cell of text for kinds whose letter does not."""

INK = "#1b2430"
GREY = "#5d6b7c"
PAPER = "#ffffff"
GRID = "#e3e8ee"
COLOURS = {
    Kind.F: "#56b4e9",
    Kind.R: "#cc79a7",
    Kind.B: "#009e73",
    Kind.I: "#c7e9a0",
    Kind.W: "#f0a830",
    Kind.STEP: "#9c2f06",
}
MOVE_COLOURS = {
    Kind.OFFLOAD: "#26355c",
    Kind.FETCH: "#bcc6de",
    Kind.OFFLOAD_V: "#d55e00",
    Kind.FETCH_V: "#f5c48f",
}
"""Of a row that has nothing else in it."""
PHASE_COLOURS = {"warmup": "#c3cedb", "steady": "#46566b", "cooldown": "#8a99ad"}
HELD, VERSIONS = "#6b5b95", COLOURS[Kind.STEP]
"""Of the curves below a schedule: microbatches and weight versions that a rank holds."""
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
"""Of the lines of a chart."""

TERMINAL_COLOURS = {
    Kind.F: "blue",
    Kind.R: "cyan",
    Kind.B: "green",
    Kind.I: "green",
    Kind.W: "magenta",
    Kind.STEP: "yellow",
    Kind.OFFLOAD: "red",
    Kind.FETCH: "red",
    Kind.OFFLOAD_V: "bright_red",
    Kind.FETCH_V: "bright_red",
}
TRACE_COLOURS = {
    Kind.F: "rail_response",
    Kind.R: "rail_load",
    Kind.B: "good",
    Kind.I: "good",
    Kind.W: "rail_animation",
    Kind.STEP: "bad",
    Kind.OFFLOAD: "thread_state_iowait",
    Kind.FETCH: "thread_state_runnable",
    Kind.OFFLOAD_V: "terrible",
    Kind.FETCH_V: "olive",
}
"""Names of chrome://tracing's own palette; Perfetto colours by the letters of an event's name, which also differ."""
