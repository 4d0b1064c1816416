"""`timeline.json` and the picture of text, from a hand-made trace of two ranks."""

from __future__ import annotations

import json
from pathlib import Path

from vpipe.report.timeline import draw_timeline, iteration_window
from vpipe.report.trace import build_timeline, read_timeline, write_timeline
from vpipe.runtime.trace import TraceEvent
from vpipe.schedule.action import Action

MS = 1_000_000
ORIGIN = 1_700_000_000_000_000_000


def _event(
    rank: int, action: str, start_ms: float, end_ms: float, wait_ms: float = 0, iteration: int = 0
) -> TraceEvent:
    times = [ORIGIN + round(time * MS) for time in (start_ms, end_ms)]
    return TraceEvent(rank, Action.parse(action), iteration, times[0], times[1], round(wait_ms * MS))


# One batch of one microbatch: F 2 ms, B 4 ms, a message 1 ms each way, U 1 ms.
EVENTS = [
    _event(1, "1RECV_F0", 0, 3, 3),
    _event(1, "1F0", 3, 5),
    _event(1, "1B0", 5, 9),
    _event(1, "1SEND_B0", 9, 9),
    _event(1, "1STEP0", 9, 10),
    _event(0, "0F0", 0, 2),
    _event(0, "0SEND_F0", 2, 2),
    _event(0, "0RECV_B0", 2, 10, 8),
    _event(0, "0B0", 10, 14),
    _event(0, "0STEP0", 14, 15),
]


def test_the_timeline_has_one_named_row_per_rank() -> None:
    rows = [item for item in build_timeline(EVENTS)["traceEvents"] if item["ph"] == "M"]
    names = {item["tid"]: item["args"]["name"] for item in rows if item["name"] == "thread_name"}
    assert names == {0: "rank 0", 1: "rank 1"}


def test_actions_become_slices_in_microseconds_from_the_first_start() -> None:
    slices = [item for item in build_timeline(EVENTS)["traceEvents"] if item["ph"] == "X" and item["tid"] == 0]
    shown = [(item["name"], item["cat"], item["ts"], item["dur"]) for item in slices]
    assert shown == [
        ("F0", "forward", 0.0, 2000.0),
        ("SEND_F0", "communication", 2000.0, 0.0),
        ("wait RECV_B0", "wait", 2000.0, 8000.0),
        ("B0", "backward", 10000.0, 4000.0),
        ("STEP", "update", 14000.0, 1000.0),
    ]
    assert slices[3]["args"] == {"action": "0B0", "stage": 0, "microbatch": 0, "iteration": 1, "wait_ms": 0.0}
    assert len({item["cname"] for item in slices}) == 5


def test_waiting_inside_an_action_is_a_slice_of_its_own() -> None:
    slices = [item for item in build_timeline([_event(0, "0F1", 1, 4, 2)])["traceEvents"] if item["ph"] == "X"]
    assert [(item["name"], item["ts"], item["dur"]) for item in slices] == [
        ("wait F1", 0.0, 2000.0),
        ("F1", 2000.0, 1000.0),
    ]


def test_the_file_is_json(tmp_path: Path) -> None:
    write_timeline(tmp_path / "timeline.json", EVENTS)
    assert json.loads((tmp_path / "timeline.json").read_text()) == build_timeline(EVENTS)


def test_an_empty_trace_is_a_timeline_too() -> None:
    assert build_timeline([])["traceEvents"] == []


def test_the_picture_is_drawn_to_scale() -> None:
    window = iteration_window(EVENTS, 0)
    assert window == (ORIGIN, ORIGIN + 15 * MS)
    assert draw_timeline(EVENTS, window, width=30) == [
        "F0--................B0------U0",
        "......F0--B0------U0          ",
    ]


def test_narrow_cells_keep_their_letter_and_stages_are_named_where_a_rank_has_several() -> None:
    events = [_event(0, "0F10", 0, 1), _event(0, "2F10", 1, 10), _event(0, "2STEP10", 10, 10)]
    assert draw_timeline(events, (ORIGIN, ORIGIN + 10 * MS), width=10) == ["F2F10-----"]


def test_the_window_shows_neighbours_in_an_asynchronous_run() -> None:
    events = [_event(0, "0F0", 0, 4), _event(0, "0F1", 4, 8, iteration=1), _event(0, "0B0", 8, 12)]
    window = iteration_window(events, 1)
    assert window == (ORIGIN + 4 * MS, ORIGIN + 8 * MS)
    assert draw_timeline(events, window, width=8) == ["F1------"]
    assert iteration_window(events, 7) is None


def test_a_timeline_that_was_written_is_drawn_as_what_was_measured(tmp_path: Path) -> None:
    write_timeline(tmp_path / "timeline.json", EVENTS)
    events = read_timeline(tmp_path / "timeline.json")
    window = iteration_window(events, 0)
    assert window == (0, 15 * MS)
    assert draw_timeline(events, window, 60) == draw_timeline(EVENTS, (ORIGIN, ORIGIN + 15 * MS), 60)
