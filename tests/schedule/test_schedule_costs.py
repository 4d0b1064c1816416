from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Kind
from vpipe.schedule.placement import Placement
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.simulate.costs import Costs, Link
from vpipe.schedule.simulate.simulate import simulate


def test_rank_shares_are_split_evenly_over_the_rank_s_stages() -> None:
    costs = Costs.from_rank_shares(Placement(2, 2, "v"), forward=(1.0, 3.0), input_grad=2, weight_grad=4, step=1)
    assert costs.forward == (0.5, 1.5, 1.5, 0.5)
    assert costs.input_grad == (1.0,) * 4
    assert costs.step == (0.5,) * 4
    assert costs.durations(4)[Kind.B] == (3.0,) * 4
    assert costs.durations(4)[Kind.R] == costs.forward


def test_transfers_are_bytes_over_bandwidth() -> None:
    costs = Costs.from_rank_shares(Placement(3), bandwidth=4.0, message_bytes=10)
    assert costs.hops(Placement(3)) == (((2.5, 0.0), (2.5, 0.0)),) * 2
    assert Costs.from_rank_shares(Placement(3), message_bytes=10).hops(Placement(3))[0] == ((0.0, 0.0),) * 2
    assert Costs((1.0,), (1.0,), (1.0,), (0.0,)).hops(Placement(1)) == ((), ())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"forward": -1.0}, "forward must be a finite number from 0 on, got -1"),
        ({"step": math.nan}, "step must be a finite number from 0 on, got nan"),
        ({"latency": math.inf}, "latency must be a finite number from 0 on, got inf"),
        ({"bandwidth": 0.0}, "bandwidth must be above 0, got 0"),
        ({"dispatch": -0.1}, "dispatch must be a finite number from 0 on, got -0.1"),
        ({"recompute": (1.0, 1.0, 1.0)}, "recompute has 3 numbers for 2 ranks; give one per rank"),
        ({"weight_grad": (1.0, 2.0, 3.0)}, "weight_grad has 3 numbers for 2 ranks; give one per rank"),
    ],
)
def test_impossible_costs_are_rejected(options: dict[str, float], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        Costs.from_rank_shares(Placement(2), **options)  # type: ignore[arg-type]


def test_costs_of_other_stages_are_rejected() -> None:
    schedule = build_schedule("gpipe", 2, 2)
    three, two = (1.0,) * 3, (1.0,) * 2
    with pytest.raises(ScheduleError, match="forward has 3 entries for 2 stages; give one per stage"):
        simulate(schedule, Costs(three, two, two, two))
    with pytest.raises(ScheduleError, match="message_bytes has 5 entries for 2 stages"):
        simulate(schedule, Costs(two, two, two, two, bandwidth=1.0, message_bytes=(1.0,) * 5))


def test_dispatch_comes_on_top_of_every_computation() -> None:
    costs = Costs.from_rank_shares(Placement(2), dispatch=0.25)
    assert costs.durations(2)[Kind.B] == (2.25, 2.25)
    assert costs.durations(2)[Kind.STEP] == (0.25, 0.25)
    # 8 microbatches and 3 ranks of filling, each a forward and a backward; then the update.
    simulation = simulate(build_schedule("1f1b", 4, 8), Costs.from_rank_shares(Placement(4), dispatch=0.25))
    assert simulation.makespan == pytest.approx(11 * (1.25 + 2.25) + 0.25)
    assert simulation.work == pytest.approx((8 * 3.5 + 0.25,) * 4)


def test_recomputation_has_its_own_time(draw: Callable[..., Schedule]) -> None:
    schedule = draw("0F0 0R0 0B0 0STEP0")
    assert simulate(schedule, Costs.from_rank_shares(schedule.placement)).makespan == 4
    assert simulate(schedule, Costs.from_rank_shares(schedule.placement, recompute=0.5)).makespan == 3.5


def test_links_differ_by_rank_and_direction() -> None:
    links = {(0, 1): Link(latency=2.0), (2, 1): Link(bandwidth=5.0)}
    costs = Costs.from_rank_shares(Placement(3), latency=0.5, message_bytes=10, bandwidth=10.0, links=links)
    ahead, back = costs.hops(Placement(3))
    assert ahead == ((0.0, 2.0), (1.0, 0.5))
    assert back == ((1.0, 0.5), (2.0, 0.0))
    assert Costs.from_rank_shares(Placement(2, 2, "v"), latency=1.0).hops(Placement(2, 2, "v"))[0][1] == (0.0, 0.0)
    with pytest.raises(ScheduleError, match=r"links has one for ranks \(2, 1\), but there are only 0 to 1"):
        Costs.from_rank_shares(Placement(2), links=links).hops(Placement(2))
    with pytest.raises(ScheduleError, match="bandwidth must be above 0, got -1"):
        Link(bandwidth=-1.0)


def test_a_slow_link_slows_one_direction_only() -> None:
    schedule = build_schedule("naive", 2, 1)
    slow = Costs.from_rank_shares(schedule.placement, links={(1, 0): Link(latency=3.0)})
    starts = {str(event.action): event.start for events in simulate(schedule, slow).events for event in events}
    assert (starts["1F0"], starts["0B0"]) == (1.0, 4.0 + 3.0)
