from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Kind
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.schedule import Schedule, WeightRule
from vpipe.schedule.weights import StageWeights, weight_usage

SIZES = [(p, m) for p in range(1, 7) for m in (1, 2, 3, 5, 8, 13)]


def _count_by_hand(schedule: Schedule, stage: int, usage: StageWeights) -> int:
    """At every place of the order, collect the versions that are newest, in flight, or still to be used."""
    order, peak, made = schedule.stage_order(stage), 1, 0
    for place, action in enumerate(order):
        made += action.kind is Kind.STEP
        to_come = {later.microbatch for later in order[place + 1 :] if later.kind in (Kind.F, Kind.B, Kind.W)}
        needed = {usage.version_of[microbatch] for microbatch in to_come if usage.version_of[microbatch] <= made}
        peak = max(peak, len(needed | {made}))
    return peak


@pytest.mark.parametrize("name", ["naive", "gpipe", "1f1b"])
def test_synchronous_schedules_have_one_version_and_no_staleness(name: str) -> None:
    for p, m in SIZES:
        for usage in weight_usage(build_schedule(name, p, m)):
            assert usage == StageWeights((0,) * m, (0,) * m, (0,) * m, 1, 1)


def test_pipedream_is_p_minus_1_minus_s_stale_and_keeps_p_minus_s_versions() -> None:
    for p, m in SIZES:
        for stage, usage in enumerate(weight_usage(build_schedule("pipedream", p, m))):
            assert usage.update_of == tuple(range(m))
            assert usage.staleness == tuple(min(k, p - 1 - stage) for k in range(m))
            if m >= 2 * (p - 1 - stage):  # enough to reach the steady state
                assert usage.num_versions == p - stage


def test_vertical_sync_is_p_minus_1_stale_with_p_versions_everywhere() -> None:
    for p, m in SIZES:
        for usage in weight_usage(build_schedule("pipedream", p, m, vertical_sync=True)):
            assert usage.version_of == tuple(max(k - (p - 1), 0) for k in range(m))
            assert usage.staleness == tuple(min(k, p - 1) for k in range(m))
            if m >= 2 * (p - 1):
                assert usage.num_versions == p


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_2bw_is_one_update_stale_with_at_most_two_versions(extra: int) -> None:
    for p, m in SIZES:
        group = max(p, 2) + extra
        for usage in weight_usage(build_schedule("pipedream", p, m, microbatches_per_update=group)):
            assert usage.update_of == tuple(k // group for k in range(m))
            assert usage.staleness == tuple(int(k >= group) for k in range(m))
            assert usage.num_versions == (2 if m > group else 1)


def test_a_last_incomplete_group_is_an_update_of_its_own() -> None:
    schedule = build_schedule("pipedream", 4, 10, microbatches_per_update=4)
    updates = [str(action) for action in schedule.orders[2] if action.kind is Kind.STEP]
    assert updates == ["2STEP3", "2STEP7", "2STEP9"]
    assert weight_usage(schedule)[2].update_of == (0, 0, 0, 0, 1, 1, 1, 1, 2, 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"vertical_sync": True}, {"microbatches_per_update": 6}, {"depths": (5, 5, 2, 2)}, {"depths": (1, 0, 0, 0)}],
)
def test_versions_counted_by_hand(options: dict[str, Any]) -> None:
    for m in (1, 2, 4, 9, 17):
        schedule = build_schedule("pipedream", 4, m, **options)
        for stage, usage in enumerate(weight_usage(schedule)):
            assert usage.num_versions == _count_by_hand(schedule, stage, usage), (m, stage)


def test_a_split_backward_keeps_its_version_until_the_weight_gradient(draw: Callable[..., Schedule]) -> None:
    late = draw("0F0 0I0 0F1 0W0 0STEP0 0I1 0W1 0STEP1", synchronous=False)
    (usage,) = weight_usage(late)
    assert usage.version_of == (0, 0)
    assert usage.update_of == (0, 1)
    assert usage.num_versions == 2


def test_a_forward_ahead_of_its_version_is_an_error(draw: Callable[..., Schedule]) -> None:
    schedule = draw("0F0 0F1 0F2 0B0 0STEP0 0B1 0STEP1 0B2 0STEP2", synchronous=False, weight_rule=WeightRule.DELAYED)
    with pytest.raises(ScheduleError, match="0F2 needs weight version 1, but stage 0 has made only 0 updates by then"):
        weight_usage(schedule)


def test_a_gradient_without_update_is_an_error(draw: Callable[..., Schedule]) -> None:
    with pytest.raises(ScheduleError, match="stage 0 has no forward and later update of microbatch 1"):
        weight_usage(draw("0F0 0B0 0STEP0 0F1 0B1", synchronous=False))
