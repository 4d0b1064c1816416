from __future__ import annotations

import json

from vpipe.draw.chrome_trace import to_chrome_trace
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import simulate


def test_every_action_is_a_slice_on_its_rank() -> None:
    simulation = simulate(build_schedule("zb-h1", 2, 3))
    rows = json.loads(json.dumps(to_chrome_trace([simulation])))["traceEvents"]
    slices = [row for row in rows if row["ph"] == "X"]
    for rank, events in enumerate(simulation.events):
        drawn = [(row["args"]["action"], row["ts"], row["dur"]) for row in slices if row["tid"] == rank]
        assert drawn == [(str(action), start * 1000, (end - start) * 1000) for action, start, end in events]
    names = [row["args"]["name"] for row in rows if row["ph"] == "M" and row["name"] != "thread_sort_index"]
    assert names == ["zb-h1", "rank 0", "rank 1"]


def test_messages_are_shown_where_they_take_time() -> None:
    schedule = build_schedule("gpipe", 2, 2)
    assert not [row for row in to_chrome_trace([simulate(schedule)])["traceEvents"] if row["ph"] == "b"]
    costs = Costs.from_rank_shares(schedule.placement, latency=0.5, bandwidth=2.0, message_bytes=4.0)
    rows = to_chrome_trace([simulate(schedule, costs)])["traceEvents"]
    begins = [row for row in rows if row["ph"] == "b"]
    ends = {row["id"]: row for row in rows if row["ph"] == "e"}
    assert [row["args"]["action"] for row in begins] == ["0SEND_F0", "0SEND_F1", "1SEND_B0", "1SEND_B1"]
    assert [(row["ts"], ends[row["id"]]["ts"]) for row in begins[:2]] == [(1000, 3500), (3000, 5500)]


def test_what_is_held_is_a_counter() -> None:
    rows = to_chrome_trace([simulate(build_schedule("1f1b", 2, 2))])["traceEvents"]
    counts = [(row["ts"], row["args"]["held"]) for row in rows if row["ph"] == "C" and row["name"].endswith("rank 0")]
    assert counts == [(0, 1), (1000, 2), (6000, 1), (9000, 0)]


def test_each_schedule_is_a_process() -> None:
    rows = to_chrome_trace([simulate(build_schedule(name, 2, 2)) for name in ("gpipe", "1f1b")])["traceEvents"]
    assert {row["pid"] for row in rows} == {0, 1}
