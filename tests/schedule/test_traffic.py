from __future__ import annotations

import pytest

from vpipe.schedule.placement import Placement
from vpipe.schedule.traffic import traffic


@pytest.mark.parametrize(
    ("placement", "times"),
    [
        (Placement(1), 0),
        (Placement(1, 3), 0),
        (Placement(5), 1),
        (Placement(4, 2), 7 / 3),
        (Placement(4, 2, "v"), 2),
        (Placement(3, 4, "v"), 4),
    ],
)
def test_traffic_counts_cuts_between_ranks(placement: Placement, times: float) -> None:
    assert traffic(placement) == pytest.approx(times)
