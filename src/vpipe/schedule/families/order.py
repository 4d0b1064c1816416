"""Write the order of one rank by naming stages and kinds only: microbatches count up by themselves.

Gradients must accumulate in microbatch order, so the next forward, input gradient or weight gradient of a stage is
always that of the next microbatch. A builder that says only *what comes next* cannot get that wrong.
"""

from __future__ import annotations

from collections import deque

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Action, Kind

__all__ = ["RankOrder", "require_two_stages"]


class RankOrder:
    """The order of a rank, as it grows."""

    def __init__(self) -> None:
        self._actions: list[Action] = []
        self._next: dict[tuple[int, Kind], int] = {}
        self._pending: deque[Action] = deque()

    def add(self, stage: int, *kinds: Kind) -> None:
        """Add the next microbatch of `stage` for each of `kinds`, e.g. ``F``, or ``I, W``."""
        for kind in kinds:
            # A full backward is an input and a weight gradient: it counts as both.
            microbatch = self.count(stage, Kind.I if kind is Kind.B else kind)
            for counted in (Kind.I, Kind.W) if kind is Kind.B else (kind,):
                self._next[stage, counted] = microbatch + 1
            self._actions.append(Action(stage, kind, microbatch))

    def add_deferring(self, stage: int) -> None:
        """Add the next input gradient of `stage` and queue its weight gradient for `add_deferred`."""
        self.add(stage, Kind.I)
        self._pending.append(Action(stage, Kind.W, self.count(stage, Kind.I) - 1))

    def add_deferred(self) -> bool:
        """Add the oldest weight gradient in the queue; return whether there was one."""
        if self._pending:
            self.add(self._pending.popleft().stage, Kind.W)
            return True
        return False

    def count(self, stage: int, kind: Kind) -> int:
        """Return how many microbatches of `stage` have their `kind`."""
        return self._next.get((stage, kind), 0)

    def finish(self, num_microbatches: int) -> list[Action]:
        """Return the order of the first `num_microbatches` with an update of each stage, last stage first.

        Leaving out the later microbatches of a legal order leaves it legal: an action never waits for a later one.
        """
        kept = [action for action in self._actions if action.microbatch < num_microbatches]
        stages = sorted({action.stage for action in kept}, reverse=True)
        return kept + [Action(stage, Kind.STEP, num_microbatches - 1) for stage in stages]


def require_two_stages(name: str, stages_per_rank: int) -> None:
    """Check that a schedule with V placement got the two stages per rank that it is made for.

    Raises:
        ScheduleError: it got another number.
    """
    if stages_per_rank != 2:
        raise ScheduleError(
            f"schedule '{name}' holds 2 stages on each rank (down the ranks and up again), got "
            f"stages_per_rank={stages_per_rank}; set it to 2"
        )
