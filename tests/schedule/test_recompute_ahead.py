from __future__ import annotations

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.passes.recompute_ahead import insert_recomputes, recompute_ahead
from vpipe.schedule.proof.validate import validate_schedule
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import simulate


def costs_of(num_stages: int, recompute: tuple[float, ...], **changes: object) -> Costs:
    ones = (1.0,) * num_stages
    return Costs(ones, ones, ones, (0.0,) * num_stages, recompute=recompute, **changes)  # type: ignore[arg-type]


def test_a_backward_takes_longer_where_nothing_was_recomputed_ahead() -> None:
    schedule = build_schedule("1f1b", 1, 2)
    assert simulate(schedule, costs_of(1, (0.5,))).makespan == 7.0
    ahead = insert_recomputes(schedule, [0])
    assert [str(action) for action in ahead.orders[0]] == ["0F0", "0R0", "0B0", "0F1", "0R1", "0B1", "0STEP1"]
    assert simulate(ahead, costs_of(1, (0.5,))).makespan == 7.0
    assert simulate(ahead, costs_of(1, ())).makespan == 8.0  # as long as a forward


def test_a_wait_for_the_gradient_hides_it() -> None:
    schedule = build_schedule("1f1b", 2, 4)
    costs = costs_of(2, (1.0, 0.0))
    without = simulate(schedule, costs).makespan
    ahead, stages = recompute_ahead(schedule, costs)
    assert stages == (0,)
    simulation = simulate(ahead, costs)
    assert simulation.makespan < without
    starts = {event.action: event.start for event in simulation.events[0]}
    gradient = next(event.end for event in simulation.events[1] if event.action == Action(1, Kind.B, 0))
    assert starts[Action(0, Kind.R, 0)] < gradient
    assert starts[Action(0, Kind.B, 0)] == gradient


@pytest.mark.parametrize("family", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v", "pipedream"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_it_is_legal_never_slower_and_holds_no_more_microbatches(family: str, share: float) -> None:
    schedule = build_schedule(family, 4, 8)
    costs = costs_of(schedule.num_stages, (share,) * schedule.num_stages, latency=0.2)
    ahead, stages = recompute_ahead(schedule, costs)
    validate_schedule(ahead)
    assert simulate(ahead, costs).makespan <= simulate(schedule, costs).makespan
    assert peak_activations(ahead) == peak_activations(schedule)
    assert {action.stage for order in ahead.orders for action in order if action.kind is Kind.R} == set(stages)
    everywhere = insert_recomputes(schedule, range(schedule.num_stages))
    assert simulate(ahead, costs).makespan == pytest.approx(simulate(everywhere, costs).makespan)


def test_stages_that_gain_nothing_do_not_pay_for_it() -> None:
    schedule = build_schedule("1f1b", 4, 8)
    _, stages = recompute_ahead(schedule, costs_of(4, (1.0,) * 4))
    assert 3 not in stages  # the last stage never waits for a gradient
    assert stages
    _, allowed = recompute_ahead(schedule, costs_of(4, (1.0,) * 4), allowed=[1, 2])
    assert set(allowed) <= {1, 2}


def test_without_recomputation_nothing_changes() -> None:
    schedule = build_schedule("1f1b", 4, 8)
    assert recompute_ahead(schedule, costs_of(4, ())) == (schedule, ())
    assert recompute_ahead(schedule, costs_of(4, (0.0,) * 4)) == (schedule, ())
    with pytest.raises(ScheduleError, match="there is no stage 4 to recompute ahead, only 0 to 3"):
        insert_recomputes(schedule, [4])
