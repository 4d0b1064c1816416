"""What all tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule, WeightRule, freeze

# How long an example takes says how busy the machine is.
settings.register_profile("vpipe", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("vpipe")


@pytest.fixture
def draw() -> Callable[..., Schedule]:
    """Build a schedule from rows like ``0F0 0B0 0STEP0``."""

    def build(
        *rows: str,
        placement: Placement | None = None,
        synchronous: bool = True,
        weight_rule: WeightRule = WeightRule.NEWEST,
    ) -> Schedule:
        orders = [[Action.parse(word) for word in row.split()] for row in rows]
        num_microbatches = 1 + max(action.microbatch for order in orders for action in order if action.kind is Kind.F)
        placement = placement or Placement(len(rows))
        return Schedule("drawn", num_microbatches, placement, freeze(orders), synchronous, weight_rule)

    return build
