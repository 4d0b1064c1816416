from __future__ import annotations

import math

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Kind
from vpipe.schedule.costs import Costs
from vpipe.schedule.placement import Placement
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.simulate import simulate


def test_rank_shares_are_split_evenly_over_the_rank_s_stages() -> None:
    costs = Costs.from_rank_shares(Placement(2, 2, "v"), forward=(1.0, 3.0), input_grad=2, weight_grad=4, step=1)
    assert costs.forward == (0.5, 1.5, 1.5, 0.5)
    assert costs.input_grad == (1.0,) * 4
    assert costs.step == (0.5,) * 4
    assert costs.durations(4)[Kind.B] == (3.0,) * 4
    assert costs.durations(4)[Kind.R] == costs.forward


def test_transfers_are_bytes_over_bandwidth() -> None:
    costs = Costs.from_rank_shares(Placement(3), bandwidth=4.0, message_bytes=10)
    assert costs.transfers(3) == (2.5, 2.5)
    assert Costs.from_rank_shares(Placement(3), message_bytes=10).transfers(3) == (0.0, 0.0)
    assert Costs((1.0,), (1.0,), (1.0,), (0.0,)).transfers(1) == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"forward": -1.0}, "forward must be a finite number from 0 on, got -1"),
        ({"step": math.nan}, "step must be a finite number from 0 on, got nan"),
        ({"latency": math.inf}, "latency must be a finite number from 0 on, got inf"),
        ({"bandwidth": 0.0}, "bandwidth must be above 0"),
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
