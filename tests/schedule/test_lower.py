from __future__ import annotations

from collections.abc import Callable

import pytest

from vpipe.schedule.action import COMMUNICATION, Action
from vpipe.schedule.passes.lower import counterpart, lower
from vpipe.schedule.placement import Placement
from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.schedule import Schedule


def _texts(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, order)) for order in lower(schedule)]


def test_receives_stand_before_and_sends_after_what_they_serve() -> None:
    assert _texts(build_schedule("1f1b", 3, 1)) == [
        "0F0 0SEND_F0 0RECV_B0 0B0 0STEP0",
        "1RECV_F0 1F0 1SEND_F0 1RECV_B0 1B0 1SEND_B0 1STEP0",
        "2RECV_F0 2F0 2B0 2SEND_B0 2STEP0",
    ]


def test_a_split_backward_sends_after_its_first_half(draw: Callable[..., Schedule]) -> None:
    schedule = draw("0F0 0I0 0W0 0STEP0", "1F0 1R0 1I0 1W0 1STEP0")
    assert _texts(schedule) == [
        "0F0 0SEND_F0 0RECV_B0 0I0 0W0 0STEP0",
        "1RECV_F0 1F0 1R0 1I0 1SEND_B0 1W0 1STEP0",
    ]


def test_neighbours_on_one_rank_do_not_communicate(draw: Callable[..., Schedule]) -> None:
    placement = Placement(2, 2, "v")
    schedule = draw("0F0 3F0 3B0 0B0 0STEP0 3STEP0", "1F0 2F0 2B0 1B0 1STEP0 2STEP0", placement=placement)
    assert _texts(schedule) == [
        "0F0 0SEND_F0 3RECV_F0 3F0 3B0 3SEND_B0 0RECV_B0 0B0 0STEP0 3STEP0",
        "1RECV_F0 1F0 2F0 2SEND_F0 2RECV_B0 2B0 1B0 1SEND_B0 1STEP0 2STEP0",
    ]
    assert _texts(build_schedule("naive", 1, 1, stages_per_rank=2)) == ["0F0 1F0 1B0 0B0 1STEP0 0STEP0"]


@pytest.mark.parametrize("text", ["0SEND_F3", "2SEND_B0", "1RECV_F7", "1RECV_B2"])
def test_counterparts_are_mutual(text: str) -> None:
    action = Action.parse(text)
    assert counterpart(counterpart(action)) == action
    assert abs(counterpart(action).stage - action.stage) == 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_message_is_sent_and_received_once(name: str) -> None:
    schedule = build_schedule(name, 4, 8)
    cuts = [
        stage
        for stage in range(1, schedule.num_stages)
        if schedule.position_of(stage - 1) != schedule.position_of(stage)
    ]
    lowered = lower(schedule)
    messages = [action for order in lowered for action in order if action.kind in COMMUNICATION]
    assert len(messages) == len(set(messages)) == 2 * 2 * len(cuts) * 8
    assert {counterpart(action) for action in messages} == set(messages)
    compute = tuple(tuple(action for action in order if action.kind not in COMMUNICATION) for order in lowered)
    assert compute == schedule.orders
