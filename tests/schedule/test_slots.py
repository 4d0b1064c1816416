from __future__ import annotations

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Action
from vpipe.schedule.families.slots import SlotGrid
from vpipe.schedule.placement import Placement


def _grid(num_ranks: int, **slots: int) -> SlotGrid:
    grid = SlotGrid(Placement(num_ranks))
    for text, slot in slots.items():
        grid.place(Action.parse(text[1:]), slot)  # a keyword cannot start with a digit
    return grid


def _texts(grid: SlotGrid) -> list[str]:
    return [" ".join(map(str, order)) for order in grid.orders()]


def test_a_slot_holds_one_action() -> None:
    grid = _grid(1, _0F0=0)
    with pytest.raises(ScheduleError, match="0F1 and 0F0 would both run in slot 0"):
        grid.place(Action.parse("0F1"), 0)


def test_weight_gradients_fill_gaps_oldest_first() -> None:
    grid = _grid(1, _0F0=0, _0F1=1, _0I0=2, _0I1=3, _0F2=5, _0I2=6)
    grid.fill_weight_gradients()
    assert _texts(grid) == ["0F0 0F1 0I0 0I1 0W0 0F2 0I2 0W1 0W2"]


def test_gaps_close_as_far_as_inputs_allow() -> None:
    grid = _grid(2, _0F0=0, _1F0=5, _1I0=8, _0I0=10)
    grid.fill_weight_gradients()
    grid.close_gaps()
    assert _texts(grid) == ["0F0 0I0 0W0", "1F0 1I0 1W0"]
    grid.place(Action.parse("0F1"), 2)  # free: the input gradient of rank 0 runs in slot 3
    with pytest.raises(ScheduleError, match="1F1 and 1W0 would both run in slot 3"):
        grid.place(Action.parse("1F1"), 3)


def test_no_forward_moves_to_where_the_rank_would_hold_more_than_before() -> None:
    grid = _grid(1, _0F0=0, _0I0=3, _0F1=6, _0I1=8)
    grid.fill_weight_gradients()
    grid.close_gaps()
    assert _texts(grid) == ["0F0 0I0 0W0 0F1 0I1 0W1"]  # one microbatch held, as before


def test_after_the_last_forward_input_gradients_go_first() -> None:
    grid = _grid(1, _0F0=0, _0F1=1, _0I0=2, _0I1=6)
    grid.fill_weight_gradients()
    grid.close_gaps()
    assert _texts(grid) == ["0F0 0F1 0I0 0I1 0W0 0W1"]
