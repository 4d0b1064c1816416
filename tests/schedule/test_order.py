from __future__ import annotations

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Kind
from vpipe.schedule.families.order import RankOrder, require_two_stages


def _texts(order: RankOrder, num_microbatches: int) -> str:
    return " ".join(map(str, order.finish(num_microbatches)))


def test_microbatches_count_up_per_stage_and_kind() -> None:
    order = RankOrder()
    order.add(0, Kind.F)
    order.add(3, Kind.F)
    order.add(0, Kind.F, Kind.I, Kind.W)
    assert order.count(0, Kind.F) == 2
    assert _texts(order, 2) == "0F0 3F0 0F1 0I0 0W0 3STEP1 0STEP1"


def test_a_full_backward_counts_as_both_halves() -> None:
    order = RankOrder()
    order.add(0, Kind.B, Kind.I, Kind.W, Kind.B)
    assert _texts(order, 3) == "0B0 0I1 0W1 0B2 0STEP2"


def test_deferred_weight_gradients_come_oldest_first() -> None:
    order = RankOrder()
    order.add_deferring(1)
    order.add_deferring(0)
    assert [order.add_deferred() for _ in range(3)] == [True, True, False]
    assert _texts(order, 1) == "1I0 0I0 1W0 0W0 1STEP0 0STEP0"


def test_surplus_microbatches_are_left_out() -> None:
    order = RankOrder()
    order.add(0, Kind.F, Kind.F, Kind.B, Kind.B)
    assert _texts(order, 1) == "0F0 0B0 0STEP0"


def test_another_number_of_stages_is_refused() -> None:
    require_two_stages("zb-v", 2)
    with pytest.raises(ScheduleError, match="stages_per_rank=1; set it to 2"):
        require_two_stages("zb-v", 1)
