from __future__ import annotations

from typing import Any

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.simulate.simulate import simulate
from vpipe.schedule.simulate.usage import activations_over_time, weight_versions_over_time
from vpipe.schedule.weights import weight_usage


@pytest.mark.parametrize("name", SCHEDULES)
def test_curves_peak_where_the_replayed_orders_say(name: str) -> None:
    for p, m in [(1, 1), (3, 5), (4, 8)]:
        simulation = simulate(build_schedule(name, p, m))
        activations = activations_over_time(simulation)
        assert [max(held for _, held in curve) for curve in activations] == pytest.approx(
            list(peak_activations(simulation.schedule))
        )
        assert [curve[-1][1] for curve in activations] == pytest.approx([0] * p)


@pytest.mark.parametrize("options", [{}, {"vertical_sync": True}, {"microbatches_per_update": 5}])
def test_version_curves_peak_at_the_versions_kept(options: dict[str, Any]) -> None:
    schedule = build_schedule("pipedream", 4, 12, **options)
    curves = weight_versions_over_time(simulate(schedule))
    assert [max(held for _, held in curve) for curve in curves] == [
        usage.num_versions for usage in weight_usage(schedule)
    ]
    assert all(curve[-1][1] == 1 for curve in curves)


def test_activations_of_1f1b_step_by_step() -> None:
    curve = activations_over_time(simulate(build_schedule("1f1b", 2, 2)))[0]
    assert curve == ((0, 1), (1, 2), (6, 1), (9, 0))


def test_versions_of_pipedream_step_by_step() -> None:
    curves = weight_versions_over_time(simulate(build_schedule("pipedream", 2, 3)))
    # Rank 0 updates at 6, 9 and 12. Microbatch 1 needs version 0 until 9, microbatch 2 needs version 1 until 12.
    assert curves == (((0, 1), (6, 2), (12, 1)), ((0, 1),))


def test_bytes_are_per_stage() -> None:
    simulation = simulate(build_schedule("zb-v", 2, 4))
    curves = activations_over_time(simulation, (10.0, 10.0, 10.0, 10.0))
    assert [max(held for _, held in curve) for curve in curves] == [40, 40]
    assert weight_versions_over_time(simulation, (1.0, 2.0, 3.0, 4.0)) == (((0, 5.0),), ((0, 5.0),))
    with pytest.raises(ScheduleError, match="stage_bytes has 2 entries for 4 stages; give one per stage"):
        activations_over_time(simulation, (1.0, 2.0))
