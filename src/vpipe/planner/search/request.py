"""What the planner is asked: for which model and ranks, what it may choose from, and under which limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from vpipe.errors import PlanError
from vpipe.plan.policy import Policy
from vpipe.plan.recipe import Recipe
from vpipe.planner.profile.profile import Profile
from vpipe.planner.search.limits import usable_bytes

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """What to plan for. Times are minimised per sample, at a fixed global batch."""

    profile: Profile
    num_ranks: int
    batch_size: int
    schedules: Sequence[str] = ("1f1b",)
    num_microbatches: Sequence[int] | None = None
    """Those to choose from; None: all that the profile tells about."""
    limits: Sequence[int] | None = None
    """Bytes per rank, or one number for all."""
    stages_per_rank: int | None = None
    options: Recipe = field(default_factory=Recipe)
    """Whose options and moves count: each schedule takes those it has."""
    may_move_versions: bool = False
    """Whether moving weight versions that wait is for the planner to choose."""
    is_eager: bool = True
    """Whether warmups deeper than the least are tried, where links take time."""
    policies: Sequence[Policy] = tuple(Policy)
    """What blocks may do."""
    sockets: bool = False
    """Whether ranks exchange messages through sockets, not in memory that both see."""

    @property
    def rank_limits(self) -> tuple[float, ...]:
        """Return one limit per rank, infinite where there is none.

        Raises:
            PlanError: another number of limits than ranks, or one that is no number of bytes.
        """
        if self.limits is None:
            return (math.inf,) * self.num_ranks
        limits = tuple(self.limits) if len(self.limits) > 1 else tuple(self.limits) * self.num_ranks
        if len(limits) != self.num_ranks:
            raise PlanError(
                f"memory_limit has {len(limits)} entries for {self.num_ranks} ranks; give one for all, or one per rank"
            )
        for rank, limit in enumerate(limits):
            if limit < 1:
                raise PlanError(f"memory_limit of rank {rank} is {limit} bytes; a limit is at least 1 byte")
        return tuple(map(float, limits))

    @property
    def usable_limits(self) -> tuple[float, ...]:
        """Return what every rank may be planned to hold."""
        limits = self.rank_limits
        return limits if self.limits is None else tuple(float(usable_bytes(int(limit))) for limit in limits)
