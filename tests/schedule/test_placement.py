from __future__ import annotations

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.placement import Placement


def test_loop_goes_round() -> None:
    placement = Placement(3, 2)
    assert [placement.rank_of(stage) for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    assert placement.stages_of(1) == (1, 4)


def test_v_turns_back_so_that_first_and_last_stage_meet() -> None:
    placement = Placement(3, 2, "v")
    assert [placement.rank_of(stage) for stage in range(6)] == [0, 1, 2, 2, 1, 0]
    assert placement.stages_of(0) == (0, 5)


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_nothing_to_place_on(sizes: tuple[int, int]) -> None:
    with pytest.raises(ScheduleError, match="at least 1 rank and 1 stage per rank, got num_ranks="):
        Placement(*sizes)
