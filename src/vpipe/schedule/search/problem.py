"""What the search works on: the operations of one batch as whole numbers, and orders of them.

Every stage runs its forwards in microbatch order, and so its input and its weight gradients. That loses nothing:
microbatches are alike, and renaming those of an order by when they come keeps every time and every peak. So an order is
a word per rank over the letters (stage, kind), and an *operation* the number ``(3 x stage + kind) x m + microbatch``,
with kind 0, 1, 2 for F, I, W. Times are multiples of a tiny unit, so that sums compare exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule, freeze
from vpipe.schedule.simulate.costs import Costs

__all__ = ["KINDS", "Orders", "SearchProblem", "capacities"]

KINDS = (Kind.F, Kind.I, Kind.W)
Orders = list[list[int]]
"""Per rank, its operations in order; updates are left out."""

_BITS = 24


@dataclass(frozen=True)
class SearchProblem:
    """One placement with its costs, and how much each rank may hold."""

    placement: Placement
    num_microbatches: int
    costs: Costs
    capacity: tuple[int, ...]
    """Per rank, microbatches of one stage that it may hold at once."""

    @cached_property
    def unit(self) -> float:
        """The time that a whole number of 1 stands for: a power of two, far below any cost."""
        stages = self.placement.num_stages
        longest = max(max(times) for times in self.costs.durations(stages).values())
        return math.ldexp(1.0, math.frexp(longest)[1] - _BITS) if longest else 1.0

    @cached_property
    def durations(self) -> tuple[int, ...]:
        """Time of each letter, at ``3 x stage + kind``."""
        times = self.costs.durations(self.placement.num_stages)
        return tuple(
            round(times[kind][stage] / self.unit) for stage in range(self.placement.num_stages) for kind in KINDS
        )

    @cached_property
    def lags(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Time from the end of a forward, and of an input gradient, to its arrival over each cut, links being free."""
        forward, backward = self.costs.hops(self.placement)
        return (
            tuple(round((hop.occupied + hop.latency) / self.unit) for hop in forward),
            tuple(round((hop.occupied + hop.latency) / self.unit) for hop in backward),
        )

    @cached_property
    def endings(self) -> tuple[int, ...]:
        """Time of each rank's updates, which end its order."""
        steps = self.costs.durations(self.placement.num_stages)[Kind.STEP]
        return tuple(
            sum(round(steps[stage] / self.unit) for stage in self.placement.stages_of(rank))
            for rank in range(self.placement.num_ranks)
        )

    @cached_property
    def stages_of(self) -> tuple[tuple[int, ...], ...]:
        """The stages of each rank, in model order."""
        return tuple(self.placement.stages_of(rank) for rank in range(self.placement.num_ranks))

    @cached_property
    def rank_of(self) -> tuple[int, ...]:
        """The rank of each stage."""
        return tuple(self.placement.rank_of(stage) for stage in range(self.placement.num_stages))

    @cached_property
    def channels(self) -> tuple[tuple[tuple[int, int] | None, tuple[int, int] | None], ...]:
        """Per letter, the link its input comes over and the one its result leaves over; None: not over a link."""
        rank_of, last = self.rank_of, self.placement.num_stages - 1

        def link(source: int, target: int) -> tuple[int, int] | None:
            if not 0 <= source <= last or not 0 <= target <= last or rank_of[source] == rank_of[target]:
                return None
            return rank_of[source], rank_of[target]

        return tuple(
            ends
            for stage in range(last + 1)
            for ends in (
                (link(stage - 1, stage), link(stage, stage + 1)),
                (link(stage + 1, stage), link(stage, stage - 1)),
                (None, None),
            )
        )

    @property
    def num_operations(self) -> int:
        """Count the operations of all ranks."""
        return 3 * self.placement.num_stages * self.num_microbatches

    def read(self, schedule: Schedule) -> Orders:
        """Return the operations of a schedule with this placement; a full backward counts as I and W."""
        width = self.num_microbatches
        orders: Orders = []
        for order in schedule.orders:
            operations = []
            for action in order:
                first = 3 * action.stage * width + action.microbatch
                if action.kind is Kind.F:
                    operations.append(first)
                if action.kind in (Kind.B, Kind.I):
                    operations.append(first + width)
                if action.kind in (Kind.B, Kind.W):
                    operations.append(first + 2 * width)
            orders.append(operations)
        return orders

    def write(self, name: str, orders: Orders, whole: frozenset[int] = frozenset()) -> Schedule:
        """Return orders as a schedule; I and W that are neighbours become one full backward on the stages `whole`."""
        width, last = self.num_microbatches, self.num_microbatches - 1
        rows = []
        for rank, operations in enumerate(orders):
            row: list[Action] = []
            for operation in operations:
                letter, microbatch = divmod(operation, width)
                stage, kind = divmod(letter, 3)
                if kind == 2 and stage in whole and row[-1] == Action(stage, Kind.I, microbatch):
                    row[-1] = Action(stage, Kind.B, microbatch)
                else:
                    row.append(Action(stage, KINDS[kind], microbatch))
            rows.append(row + [Action(stage, Kind.STEP, last) for stage in reversed(self.stages_of[rank])])
        return Schedule(name, width, self.placement, freeze(rows))


def capacities(limits: Sequence[float], stages_per_rank: int) -> tuple[int, ...]:
    """Turn limits in whole-rank units into microbatches of one stage."""
    return tuple(math.floor(limit * stages_per_rank + 1e-9) for limit in limits)
