"""What every block does with the activations that its backward needs: keep, recompute, or swap them."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from enum import Enum

from vpipe.errors import PlanError
from vpipe.plan.partition import Partition

__all__ = ["Policy", "check_ratios", "ratios_of", "recompute_blocks", "stages_with", "trailing_policies"]


class Policy(str, Enum):
    """What a block does with its activations between forward and backward."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    SWAP = "swap"


def check_ratios(ratios: Sequence[float], num_stages: int) -> list[str]:
    """Return why `ratios` are not one recompute ratio per stage; empty when they are."""
    reasons = []
    if len(ratios) != num_stages:
        reasons.append(
            f"has {len(ratios)} entries for {num_stages} stages; give one ratio per stage, or one number for all"
        )
    for stage, ratio in enumerate(ratios):
        if not 0 <= ratio <= 1:
            reasons.append(f"gives stage {stage} the ratio {ratio}; a ratio is from 0 to 1")
    return reasons


def recompute_blocks(num_blocks: int, ratio: float) -> int:
    """Return how many of a stage's blocks, counted from its end, keep no activations: ``num_blocks * ratio``, half up.

    The product is taken of the decimal number as it is written, so 0.35 of 10 blocks is 3.5 and gives 4.

    Raises:
        PlanError: `ratio` is outside 0 to 1.
    """
    if not 0 <= ratio <= 1:
        raise PlanError(f"recompute_ratio is {ratio}; a ratio is from 0 to 1")
    return int((Decimal(str(ratio)) * num_blocks).to_integral_value(ROUND_HALF_UP))


def trailing_policies(partition: Sequence[int], ratios: Sequence[float]) -> tuple[Policy, ...]:
    """Return what recompute ratios mean: the last share of each stage's blocks recomputes, the others keep.

    Raises:
        PlanError: a ratio is outside 0 to 1.
    """
    policies: list[Policy] = []
    for size, ratio in zip(partition, ratios, strict=True):
        count = recompute_blocks(size, ratio)
        policies += [Policy.KEEP] * (size - count) + [Policy.RECOMPUTE] * count
    return tuple(policies)


def ratios_of(partition: Partition, policies: Sequence[Policy]) -> tuple[float, ...]:
    """Return the share of each stage's blocks that recompute: exact where these are its last ones."""
    shares = []
    for start, stop in partition.ranges:
        shares.append(round(policies[start:stop].count(Policy.RECOMPUTE) / (stop - start), 4))
    return tuple(shares)


def stages_with(policy: Policy, partition: Partition, policies: Sequence[Policy]) -> frozenset[int]:
    """Return the stages that have a block with this policy."""
    return frozenset(stage for stage, (start, stop) in enumerate(partition.ranges) if policy in policies[start:stop])
