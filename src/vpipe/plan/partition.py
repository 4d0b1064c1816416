"""Cut a chain of blocks into contiguous stages: block counts per stage, checked, and how many of them recompute."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal

from vpipe.errors import PlanError

__all__ = [
    "check_partition",
    "check_ratios",
    "partition_by_weight",
    "partition_uniform",
    "recompute_blocks",
    "validate_partition",
]


def partition_uniform(num_blocks: int, num_stages: int) -> list[int]:
    """Cut into stages of equal block counts; where they do not divide, the first stages get one more.

    Raises:
        PlanError: fewer blocks than stages.
    """
    _require_blocks(num_blocks, num_stages)
    size, rest = divmod(num_blocks, num_stages)
    return [size + 1] * rest + [size] * (num_stages - rest)


def partition_by_weight(weights: Sequence[float], num_stages: int) -> list[int]:
    """Cut so that the heaviest stage is as light as any contiguous cut can make it; return block counts.

    For a given limit, the cut that fills stage after stage as far as it goes leaves least to the last ones: a limit is
    feasible exactly when this cut takes all blocks. Bisection finds the smallest such limit, in integers, so exactly.

    Args:
        weights: time, bytes or parameters of each block, in model order; any unit.
        num_stages: stages to cut into; each gets at least one block.

    Raises:
        PlanError: fewer blocks than stages, or a weight that is negative or not finite.
    """
    _require_blocks(len(weights), num_stages)
    for block, weight in enumerate(weights):
        if not math.isfinite(weight) or weight < 0:
            raise PlanError(f"the weight of block {block} is {weight}; a weight is a finite number of at least 0")
    sums = list(itertools.accumulate(_as_integers(weights), initial=0))
    low = max(end - start for start, end in itertools.pairwise(sums))
    high = sums[-1]
    while low < high:
        limit = (low + high) // 2
        if _fill(sums, num_stages, limit)[-1] == len(weights):
            high = limit
        else:
            low = limit + 1
    return [end - start for start, end in itertools.pairwise([0, *_fill(sums, num_stages, high)])]


def check_partition(partition: Sequence[int], num_blocks: int, num_stages: int) -> list[str]:
    """Return why `partition` (blocks per stage) does not cut `num_blocks` into `num_stages`; empty when it does."""
    reasons = []
    if num_stages > num_blocks:
        reasons.append(
            f"{num_stages} stages are more than the model's {num_blocks} blocks; use at most {num_blocks} stages"
        )
    if len(partition) != num_stages:
        reasons.append(f"has {len(partition)} entries for {num_stages} stages; give one block count per stage")
    for stage, size in enumerate(partition):
        if size < 1:
            reasons.append(f"gives stage {stage} {size} blocks; a stage has at least 1")
    total = sum(partition)
    if total != num_blocks:
        fix = f"add {num_blocks - total}" if total < num_blocks else f"take away {total - num_blocks}"
        reasons.append(f"has {total} blocks in all, and the model has {num_blocks}; {fix}")
    return reasons


def validate_partition(partition: Sequence[int], num_blocks: int, num_stages: int) -> None:
    """Raise unless `partition` cuts `num_blocks` blocks into `num_stages`.

    Raises:
        PlanError: with every reason.
    """
    reasons = check_partition(partition, num_blocks, num_stages)
    if reasons:
        raise PlanError(f"partition {list(partition)} " + "; it ".join(reasons))


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


def _require_blocks(num_blocks: int, num_stages: int) -> None:
    if num_stages < 1:
        raise PlanError(f"cannot cut into {num_stages} stages; use at least 1")
    if num_blocks < num_stages:
        raise PlanError(f"cannot cut {num_blocks} blocks into {num_stages} stages; use at most {num_blocks} stages")


def _as_integers(weights: Sequence[float]) -> list[int]:
    """Scale weights by one power of two that makes them all whole: every float is a fraction over such a power."""
    ratios = [float(weight).as_integer_ratio() for weight in weights]
    scale = max(denominator for _, denominator in ratios)
    return [numerator * (scale // denominator) for numerator, denominator in ratios]


def _fill(sums: Sequence[int], num_stages: int, limit: int) -> list[int]:
    """Return each stage's end when stages are filled up to `limit` in turn, a block left for each later stage.

    `limit` is at least the heaviest block; the last end falls short of the number of blocks when it is too low.
    """
    ends, start = [], 0
    for stage in range(num_stages):
        last = len(sums) - num_stages + stage
        start = bisect.bisect_right(sums, sums[start] + limit, start + 1, last + 1) - 1
        ends.append(start)
    return ends
