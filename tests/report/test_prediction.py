"""Predictions are exact for an executor that does what the model says, and its costs alone are given."""

from __future__ import annotations

import pytest
from trace_toys import Executor

from vpipe.errors import ScheduleError
from vpipe.plan.recipe import Recipe
from vpipe.report.measured_costs import MeasuredCosts, Overheads, measure_costs
from vpipe.report.prediction import predict_step
from vpipe.schedule.action import Kind

UNEQUAL = {
    (stage, kind): time * (1 + stage % 3 / 4)
    for stage in range(8)
    for kind, time in ((Kind.F, 6.0), (Kind.B, 11.0), (Kind.I, 5.0), (Kind.W, 6.0), (Kind.STEP, 0.4))
}
SLOW = {"latency": 3.0, "occupied": 2.5}
BUSY = {"gap": 0.01, "send": 0.2, "receive": 0.3, "latency": 0.4, "turn": 0.8}
NAMES = ("1f1b", "gpipe", "naive", "interleaved", "looped-bfs", "zb-h1", "zb-v", "v-half", "dualpipe-v", "pipedream")


def period(events):
    """Return the time between rank 0's updates of two late batches."""
    ends = {}
    for event in events:
        if event.rank == 0 and event.action.kind is Kind.STEP:
            ends[event.iteration] = max(ends.get(event.iteration, 0), event.end_ns / 1e6)
    last = max(ends) - 3
    return (ends[last] - ends[last - 4]) / 4


def run_and_predict(name, executor, size=8, batches=14, num_ranks=4):
    recipe = Recipe(name, size, num_ranks)
    events = executor.run(recipe.build(1 if recipe.synchronous else batches), batches, size)
    middle = [event for event in events if 4 <= event.iteration < 11]
    return period(events), predict_step(recipe, measure_costs(middle), [1.0] * (recipe.build().num_stages - 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("costs", [{}, BUSY, SLOW], ids=["plain", "overheads", "slow"])
def test_a_model_executor_takes_what_is_predicted(name, costs):
    measured, prediction = run_and_predict(name, Executor(UNEQUAL, **costs))
    # What is left is in the links, whose messages do not all show when they arrived.
    assert prediction.step_ms == pytest.approx(measured, rel=0.01)


def test_a_rank_that_waits_for_the_loss_begins_later():
    executor = Executor({**UNEQUAL, (1, Kind.W): 30.0}, turn=0.5, tell=4.0)
    measured, prediction = run_and_predict("zb-h1", executor, num_ranks=2)
    assert prediction.step_ms == pytest.approx(measured, rel=1e-3)
    without, _ = run_and_predict("zb-h1", Executor({**UNEQUAL, (1, Kind.W): 30.0}, turn=0.5), num_ranks=2)
    assert measured > without + 1


def test_an_update_in_which_all_meet_holds_up_all():
    measured, prediction = run_and_predict("zb-h1", Executor(UNEQUAL, meet=2.0, turn=0.3))
    assert prediction.step_ms == pytest.approx(measured, rel=1e-3)


def test_overheads_are_no_work():
    work = {(stage, kind): 1.0 for stage in range(4) for kind in (Kind.F, Kind.I, Kind.W, Kind.STEP)}
    for stage in range(4):
        work[stage, Kind.STEP] = 0.0

    recipe = Recipe("1f1b", 8, 4)
    plain = predict_step(recipe, MeasuredCosts(work, Overheads(), {}), ())
    assert plain.step_ms == pytest.approx(33)
    assert plain.bubble_fraction == pytest.approx(3 / 11)
    loaded = predict_step(recipe, MeasuredCosts(work, Overheads(gap_ms=0.5, turn_ms=2.0), {}), ())
    assert loaded.step_ms > 33 + 0.5 * 23
    assert loaded.bubble_fraction == pytest.approx(1 - 24 / loaded.step_ms)
    alone = MeasuredCosts(work, Overheads(gap_ms=0.5, turn_ms=2.0), {})
    single = predict_step(Recipe("1f1b", 8, 1), alone, ())
    assert single.step_ms == pytest.approx(24 + 0.5 * 17 + 2)


def test_a_stage_that_was_not_measured_is_told():
    work = {(0, Kind.F): 1.0, (0, Kind.B): 2.0, (1, Kind.F): 1.0}
    with pytest.raises(
        ScheduleError, match="of stage 1, F was measured; its forwards and all of its backwards are needed"
    ):
        predict_step(Recipe("1f1b", 4, 2), MeasuredCosts(work, Overheads(), {}), ())
