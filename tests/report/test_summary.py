"""The summary's table: everything it says, with parts missing, and its JSON."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from vpipe.report.bubble import between_iterations
from vpipe.report.summary import render_summary, summarize_trace
from vpipe.runtime.trace import TraceEvent
from vpipe.schedule.action import Action

MS = 1_000_000


def _event(rank: int, action: str, iteration: int, start: int, end: int, wait: int = 0) -> TraceEvent:
    return TraceEvent(rank, Action.parse(action), iteration, start * MS, end * MS, wait * MS)


def _trace(num_iterations: int) -> list[TraceEvent]:
    events = []
    for iteration in range(num_iterations):
        at = 20 * iteration
        events += [
            _event(0, "0F0", iteration, at, at + 2),
            _event(0, "0RECV_B0", iteration, at + 2, at + 8, 6),
            _event(0, "0B0", iteration, at + 8, at + 12),
            _event(1, "1RECV_F0", iteration, at, at + 2, 2),
            _event(1, "1F0", iteration, at + 2, at + 4),
            _event(1, "1B0", iteration, at + 4, at + 8),
        ]
    return events


def _text(summary: dict[str, Any], width: int = 140, colour: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=colour, color_system="standard" if colour else None)
    console.print(render_summary(summary))
    return file.getvalue()


SUMMARY: dict[str, Any] = {
    "final_loss": 5.43219,
    "eval_loss": 5.5,
    "samples_per_second": 123.456,
    "iteration_ms": 259.2,
    "bubble_fraction": 0.2727,
    "communication_share": 0.31,
    "bytes_sent": [1024, 3 * 1024**2],
    "bytes_received": [3 * 1024**2, 1024],
    "peak_memory_bytes": [512, 2 * 1024**3],
    "weight_versions": [2, 1],
    "ranks": [
        {
            "rank": 0,
            "stages": [0],
            "blocks": list(range(12)),
            "forward_ms": 1.5,
            "backward_ms": 3.25,
            "busy_share": 0.75,
        },
        {"rank": 1, "stages": [1, 2], "blocks": [12, 15, 16, 20], "waiting_share": 0.125},
    ],
    "timeline": {"iteration": 7, "milliseconds": 15.04, "rows": ["F0--......B0----U0", "....F0--B0--U0    "]},
}


def test_the_screen() -> None:
    lines = [line.rstrip() for line in _text(SUMMARY).splitlines()]
    assert lines == [
        "final loss          5.4322",
        "held-out loss       5.5000",
        "throughput          123.5 samples/s",
        "time per iteration  259.2 ms",
        "bubble              27.3% of all ranks' time passes without computing",
        "communication       31.0% of all ranks' time goes into waiting for others",
        "messages            3.0 MiB sent, 3.0 MiB received",
        "peak memory         2.0 GiB",
        "",
        "rank  stages  blocks             forward  backward  busy  waiting  weight versions     sent  received  peak memory",
        "   0  0       0 to 11            1.50 ms   3.25 ms   75%        -                2  1.0 KiB   3.0 MiB        512 B",
        "   1  1 2     12, 15 to 16, ...        -         -     -      12%                1  3.0 MiB   1.0 KiB      2.0 GiB",
        "",
        "iteration 7, 15.0 ms   F forward, B backward, U update, . waiting",
        "rank 0 F0--......B0----U0",
        "rank 1 ....F0--B0--U0",
    ]


def test_a_narrow_console_gets_two_tables_and_no_line_is_broken() -> None:
    lines = _text(SUMMARY, width=80).splitlines()
    assert lines[9:16] == [
        "rank  stages  blocks             forward  backward  busy  waiting",
        "   0  0       0 to 11            1.50 ms   3.25 ms   75%        -",
        "   1  1 2     12, 15 to 16, ...        -         -     -      12%",
        "",
        "rank  weight versions     sent  received  peak memory",
        "   0                2  1.0 KiB   3.0 MiB        512 B",
        "   1                1  3.0 MiB   1.0 KiB      2.0 GiB",
    ]
    assert max(map(len, lines)) <= 80
    assert len(lines) == len(_text(SUMMARY).splitlines()) + 4


def test_what_was_predicted_is_whole_on_a_narrow_console() -> None:
    def compared(predicted: float, error: float) -> dict[str, float]:
        return {"predicted": predicted, "measured": predicted / (1 + error), "error": error}

    memory = [compared(41.5 * 2**20, -0.021), compared(51.1 * 2**20, 0.034)]
    screen = _text(SUMMARY | {"prediction": {"step_ms": compared(12062.2, -0.575), "memory_bytes": memory}}, width=80)
    (line,) = (line for line in screen.splitlines() if line.startswith("predicted "))
    assert line.split(maxsplit=1)[1] == "12062.2 ms (-57.5%); memory at worst 51.1 MiB (+3.4%)"


@pytest.mark.parametrize("width", [80, 140])
def test_the_picture_is_drawn_as_wide_as_the_console_where_there_are_events(width: int) -> None:
    trace = _trace(3)
    summary = summarize_trace(trace, trace)
    file = io.StringIO()
    Console(file=file, width=width).print(render_summary(summary, trace))
    *_, first, second = file.getvalue().splitlines()
    assert re.fullmatch(r"rank 0 F0-+\.+B0-+", first)
    assert len(first) == width
    assert second.startswith("rank 1 ..")


def test_the_picture_is_coloured_on_a_terminal() -> None:
    text = _text(SUMMARY, colour=True)
    for cell in ("\x1b[34mF0--", "\x1b[32mB0----", "\x1b[33mU0", "\x1b[2m......"):
        assert cell in text


@pytest.mark.parametrize("key", list(SUMMARY))
def test_any_key_may_be_missing(key: str) -> None:
    assert _text({name: value for name, value in SUMMARY.items() if name != key})


def test_an_empty_summary_and_a_single_rank() -> None:
    assert _text({}).strip() == ""
    assert re.search("peak memory +512 B", _text({"peak_memory_bytes": 512}))


def test_numbers_of_a_rank_may_stand_with_the_rank() -> None:
    assert "5 B" in _text({"ranks": [{"rank": 0, "bytes_sent": 5}]})


def test_summarize_measures_what_it_is_told_and_draws_the_middle_iteration() -> None:
    trace = _trace(3)
    summary = json.loads(json.dumps(summarize_trace(trace, between_iterations(trace, 1, 3), width=12)))
    assert summary["bubble_fraction"] == pytest.approx(1 - 24 / 64)
    assert summary["communication_share"] == pytest.approx(16 / 64)
    assert summary["ranks"][0] == {
        "rank": 0,
        "stages": [0],
        "forward_ms": 2.0,
        "backward_ms": 4.0,
        "busy_share": 12 / 32,
        "waiting_share": 12 / 32,
    }
    assert summary["timeline"] == {"iteration": 2, "milliseconds": 12.0, "rows": ["F0......B0--", "..F0B0--    "]}
    assert "rank 1 ..F0B0--" in _text(summary)


def test_summarize_an_iteration_that_was_not_recorded() -> None:
    assert summarize_trace(_trace(1), [], iteration=9)["timeline"] == {"iteration": 10, "milliseconds": 0.0, "rows": []}
    assert "timeline" not in summarize_trace([], [])
