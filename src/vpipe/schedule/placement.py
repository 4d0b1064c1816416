"""Which rank holds which stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vpipe.errors import ScheduleError

__all__ = ["Placement"]


@dataclass(frozen=True)
class Placement:
    """Stages laid over ranks.

    ``loop``: stage s is on rank ``s % num_ranks``. ``v``: ranks go up, then down again, so that with two
    stages per rank the first and the last stage share rank 0.
    """

    num_ranks: int
    stages_per_rank: int = 1
    style: Literal["loop", "v"] = "loop"

    def __post_init__(self) -> None:
        if self.num_ranks < 1 or self.stages_per_rank < 1:
            raise ScheduleError(
                f"a pipeline needs at least 1 rank and 1 stage per rank, got num_ranks={self.num_ranks} and "
                f"stages_per_rank={self.stages_per_rank}"
            )

    @property
    def num_stages(self) -> int:
        """Count the stages."""
        return self.num_ranks * self.stages_per_rank

    def rank_of(self, stage: int) -> int:
        """Return the rank that holds `stage`."""
        turn, position = divmod(stage, self.num_ranks)
        return self.num_ranks - 1 - position if self.style == "v" and turn % 2 else position

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Return the stages that `rank` holds, in model order."""
        return tuple(stage for stage in range(self.num_stages) if self.rank_of(stage) == rank)
