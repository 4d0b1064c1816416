"""Runs of a made-up executor are predicted from their files; files that cannot be used say why."""

from __future__ import annotations

import json
import math

import pytest
from run_toys import WORK, write_run
from trace_toys import Executor

from vpipe.errors import ConfigError
from vpipe.report.prediction_of_run import predict_run
from vpipe.report.trace import read_timeline, write_timeline
from vpipe.schedule.action import Kind


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("1f1b", {}),
        ("1f1b", {"stage_to_depth_map": [6, 4, 2, 0]}),
        ("gpipe", {}),
        ("naive", {}),
        ("zb-h1", {}),
        ("pipedream", {}),
        ("pipedream", {"macrobatch": True}),
    ],
)
def test_a_run_is_predicted_from_its_own_costs(tmp_path, schedule, options):
    found = predict_run(write_run(tmp_path, schedule, **options))
    assert found.prediction.step_ms == pytest.approx(found.measured_step_ms, rel=0.01)
    assert abs(found.error) < 0.01
    assert found.measured_bubble_fraction == 0.25


BLOCKS = 25
MOVED: dict[str, tuple[str, dict[str, object]]] = {
    "recompute-ahead": ("1f1b", {"recompute_ahead": [0, 2], "policies": ["recompute"] * BLOCKS}),
    "split-recompute-ahead": ("zb-h1", {"recompute_ahead": [1], "policies": ["recompute"] * BLOCKS}),
    "activations": ("gpipe", {"policies": ["swap"] * BLOCKS}),
    "some-activations": ("1f1b", {"policies": ["swap"] * 7 + ["keep"] * (BLOCKS - 7)}),
    "versions": ("pipedream", {"swap_versions": True}),
    "versions-and-activations": ("pipedream", {"swap_versions": [0], "policies": ["swap"] * BLOCKS}),
}


@pytest.mark.parametrize("name", MOVED)
def test_what_stages_do_besides_is_predicted(tmp_path, name):
    schedule, besides = MOVED[name]
    found = predict_run(write_run(tmp_path, schedule, plan=besides))
    assert abs(found.error) < 0.01
    orders = found.prediction.simulation.schedule.orders
    kinds = {action.kind for order in orders for action in order}
    assert (Kind.R in kinds) == ("recompute_ahead" in besides)
    assert (Kind.OFFLOAD in kinds) == ("swap" in besides.get("policies", ()))
    assert (Kind.OFFLOAD_V in kinds) == ("swap_versions" in besides)
    shown = {kind for kind in kinds if any(f"{kind} ms" in line for line in found.lines())}
    assert shown == kinds
    assert {key for row in found.to_dict()["stages"] for key in row if key.endswith("_ms")} == {
        f"{k}_ms" for k in kinds
    }


def test_what_an_older_plan_file_does_not_say_is_as_the_run_says_it(tmp_path):
    _, besides = MOVED["recompute-ahead"]
    directory = write_run(tmp_path, "1f1b", plan=besides)
    content = json.loads((directory / "plan.json").read_text())
    old = {key: content[key] for key in ("schedule", "num_microbatches", "stages", "cuts")}
    (directory / "plan.json").write_text(json.dumps(old))
    assert abs(predict_run(directory).error) < 0.01


def test_slow_links_are_found_in_the_files(tmp_path):
    executor = Executor(WORK, latency=2.0, occupied=16.0)
    found = predict_run(write_run(tmp_path, "gpipe", executor=executor))
    assert abs(found.error) < 0.01
    link = found.to_dict()["links"][0]
    assert 1000 / link["bandwidth_bytes_per_ms"] == pytest.approx(16, rel=0.02)


def test_the_data_is_whole_and_is_json(tmp_path):
    data = json.loads(json.dumps(predict_run(write_run(tmp_path)).to_dict(), allow_nan=False))
    assert (data["schedule"], data["num_ranks"], data["num_microbatches"]) == ("1f1b", 4, 8)
    assert data["step_ms"]["error"] == pytest.approx(data["step_ms"]["predicted"] / data["step_ms"]["measured"] - 1)
    assert data["bubble_fraction"]["measured"] == 0.25
    path = data["critical_path"]
    assert [one["end_ms"] for one in path[:-1]] == [other["start_ms"] for other in path[1:]]
    assert path[0]["start_ms"] == 0
    assert sum(data["idle"].values()) < 1
    assert data["stages"][2] == {
        "stage": 2,
        "rank": 2,
        "F_ms": pytest.approx(6.0),
        "B_ms": pytest.approx(11.0),
        "STEP_ms": pytest.approx(6.0),
    }
    assert [(link["source"], link["target"]) for link in data["links"]] == [
        (0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)
    ]  # fmt: skip
    assert data["overheads"]["send_ms"] == pytest.approx(0.2)


def test_idle_causes_and_work_are_all_of_the_time(tmp_path):
    found = predict_run(write_run(tmp_path))
    simulation = found.prediction.simulation
    busy = math.fsum(simulation.work) / (4 * simulation.makespan)
    assert math.fsum(found.idle_shares.values()) + busy == pytest.approx(1)


def test_a_run_of_one_iteration_has_the_step_of_its_summary(tmp_path):
    directory = write_run(tmp_path)
    events = read_timeline(directory / "timeline.json")
    write_timeline(directory / "timeline.json", [event for event in events if event.iteration == 5])
    assert predict_run(directory).measured_step_ms == 200.0


def test_the_text_says_it_all(tmp_path):
    lines = predict_run(write_run(tmp_path)).lines()
    assert lines[0] == "1f1b, 4 ranks, 8 microbatches"
    text = "\n".join(lines)
    for part in ("predicted", "measured", "warmup", "messages", "0 to 1: 0.4", "0.010 ms an action", "0.800 ms from"):
        assert part in text


def test_a_directory_of_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config.yml, plan.json, summary.json, timeline.json; give the dir"):
        predict_run(tmp_path)


def test_files_that_are_no_use_are_named(tmp_path):
    directory = write_run(tmp_path)
    (directory / "plan.json").write_text(json.dumps({"num_microbatches": 8}))
    with pytest.raises(ConfigError, match=r"plan.json' has no stages, cuts; it is of an older version"):
        predict_run(directory)
    (directory / "plan.json").write_text('{"num_micro')
    with pytest.raises(ConfigError, match="is not the JSON that a run writes"):
        predict_run(directory)


def test_another_order_than_todays_is_refused(tmp_path):
    directory = write_run(tmp_path, "gpipe")
    plan = json.loads((directory / "plan.json").read_text())
    (directory / "plan.json").write_text(json.dumps(plan | {"schedule": "1f1b"}))
    with pytest.raises(ConfigError, match="rank 0 ran 17 computations of iteration 5 in another order than schedule"):
        predict_run(directory)
