"""Cut a chain of blocks into contiguous stages: block counts per stage, by hand, evenly, or by weight."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

from vpipe.errors import PlanError

__all__ = ["Partition", "check_partition"]


class Partition(tuple[int, ...]):
    """Blocks of every stage, in model order: a tuple of counts that knows where its stages begin and end."""

    __slots__ = ()

    @classmethod
    def uniform(cls, num_blocks: int, num_stages: int) -> Partition:
        """Cut into stages of equal block counts; where they do not divide, the first stages get one more.

        Raises:
            PlanError: fewer blocks than stages.
        """
        _require_blocks(num_blocks, num_stages)
        size, rest = divmod(num_blocks, num_stages)
        return cls([size + 1] * rest + [size] * (num_stages - rest))

    @classmethod
    def by_weight(cls, weights: Sequence[float], num_stages: int) -> Partition:
        """Cut so that the heaviest stage is as light as any contiguous cut can make it.

        For a given limit, the cut that fills stage after stage as far as it goes leaves least to the last ones: a limit
        is feasible exactly when this cut takes all blocks. Bisection finds the smallest such limit, in integers, so
        exactly.

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
        return cls.between([0, *_fill(sums, num_stages, high)])

    @classmethod
    def between(cls, bounds: Sequence[int]) -> Partition:
        """Cut at `bounds`: where the first stage starts, and where every stage ends."""
        return cls(stop - start for start, stop in itertools.pairwise(bounds))

    @classmethod
    def checked(cls, sizes: Sequence[int], num_blocks: int, num_stages: int) -> Partition:
        """Return `sizes` as a partition of so many blocks into so many stages.

        Raises:
            PlanError: they are none; with every reason.
        """
        if reasons := check_partition(sizes, num_blocks, num_stages):
            raise PlanError(f"partition {list(sizes)} " + "; it ".join(reasons))
        return cls(sizes)

    @property
    def num_stages(self) -> int:
        """Count the stages."""
        return len(self)

    @property
    def num_blocks(self) -> int:
        """Count the blocks."""
        return sum(self)

    @property
    def starts(self) -> tuple[int, ...]:
        """Return the first block of every stage."""
        return tuple(start for start, _ in self.ranges)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Return the blocks that have a cut in front of them: the first of every stage but stage 0."""
        return self.starts[1:]

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Return first block and end of every stage."""
        return tuple(itertools.pairwise(itertools.accumulate(self, initial=0)))

    def range_of(self, stage: int) -> range:
        """Return the blocks of a stage."""
        return range(*self.ranges[stage])

    def stage_of(self, block: int) -> int:
        """Return the stage that holds a block.

        Raises:
            IndexError: there is no such block.
        """
        for stage, (start, stop) in enumerate(self.ranges):
            if start <= block < stop:
                return stage
        raise IndexError(f"block {block} is not one of the {self.num_blocks}")


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
