"""What blocks do with their activations, by ratio and by name."""

from __future__ import annotations

import pytest

from vpipe.errors import PlanError
from vpipe.plan.partition import Partition
from vpipe.plan.policy import Policy, check_ratios, ratios_of, recompute_blocks, stages_with, trailing_policies

KEEP, RECOMPUTE, SWAP = Policy.KEEP, Policy.RECOMPUTE, Policy.SWAP


def test_check_ratios() -> None:
    assert check_ratios([0.3, 0, 0, 1], 4) == []
    assert check_ratios([0.3, 1.5], 3) == [
        "has 2 entries for 3 stages; give one ratio per stage, or one number for all",
        "gives stage 1 the ratio 1.5; a ratio is from 0 to 1",
    ]


@pytest.mark.parametrize(
    ("num_blocks", "ratio", "expected"),
    [(12, 0, 0), (12, 1, 12), (12, 0.3, 4), (10, 0.35, 4), (50, 0.29, 15), (10, 0.34, 3), (5, 0.5, 3), (1, 0.49, 0)],
)
def test_recompute_blocks_rounds_half_up(num_blocks: int, ratio: float, expected: int) -> None:
    assert recompute_blocks(num_blocks, ratio) == expected


def test_recompute_blocks_refuses_a_percentage() -> None:
    with pytest.raises(PlanError, match="recompute_ratio is 30; a ratio is from 0 to 1"):
        recompute_blocks(12, 30)


def test_ratios_and_policies_say_the_same() -> None:
    partition = Partition([4, 2])
    policies = trailing_policies(partition, [0.5, 1])
    assert policies == (KEEP, KEEP, RECOMPUTE, RECOMPUTE, RECOMPUTE, RECOMPUTE)
    assert ratios_of(partition, policies) == (0.5, 1.0)


def test_stages_with_a_policy() -> None:
    policies = [KEEP, SWAP, KEEP, RECOMPUTE, SWAP, KEEP]
    assert stages_with(SWAP, Partition([2, 2, 2]), policies) == {0, 2}
    assert stages_with(RECOMPUTE, Partition([2, 2, 2]), policies) == {1}
