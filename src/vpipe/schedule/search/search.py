"""Search for the best order of one batch under given costs and a memory limit, and say how good it can be.

In each placement that is allowed, the search starts from every hand-made family that fits the memory and from list
schedules under many policies, then improves the best by tabu search. What it returns is never worse than the best of
those families. It stops at the lower bound, or after a number of steps, never by the clock: every rank finds the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

from vpipe.errors import ScheduleError
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.search.families import fitting_families
from vpipe.schedule.search.field import Budget, SearchField
from vpipe.schedule.search.problem import SearchProblem, capacities
from vpipe.schedule.search.timing import find_whole_backwards
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import simulate

__all__ = ["DEFAULT_STEPS", "SearchRequest", "SearchResult", "search"]

DEFAULT_STEPS = 2_000_000
_VARIED = 0.4  # share of the steps for varied policies
_VARY_PATIENCE = 80
_SWAP_PATIENCE = 300
_ROUNDS = 16  # of tabu search
_WORTH_IT = 1.1  # orders that are this much worse than the best are no seeds
_SHAKEN = 0.3  # share of the steps, at most, for going on from random changes
_WORTH_SHAKING = 1.3  # placements that are this much worse than the best are left alone then


@dataclass(frozen=True)
class SearchRequest:
    """What to search for; `limits` are microbatches per rank."""

    num_ranks: int
    num_microbatches: int
    limits: tuple[float, ...]
    stages_per_rank: int | None = None
    times: tuple[tuple[str, float | tuple[float, ...]], ...] = ()
    """Arguments of `Costs.from_rank_shares`."""
    num_steps: int = DEFAULT_STEPS

    @property
    def placements(self) -> tuple[Placement, ...]:
        """The placements to search: one stage per rank and two, or as many as asked for, in a V and in a loop."""
        line = (Placement(self.num_ranks),)
        count = 2 if self.stages_per_rank is None else self.stages_per_rank
        several = (Placement(self.num_ranks, count, "v"), Placement(self.num_ranks, count, "loop"))
        return line if count == 1 else several if self.stages_per_rank is not None else line + several

    def costs(self, placement: Placement) -> Costs:
        """Return the costs of the stages in `placement`."""
        return Costs.from_rank_shares(placement, **dict(self.times))  # type: ignore[arg-type]


@dataclass(frozen=True)
class SearchResult:
    """The best order found, and what it is to be measured by."""

    schedule: Schedule
    makespan: float
    lower_bound: float
    """No order under the memory limit is shorter, in any of the placements searched."""
    best_family: str
    """The best of the hand-made families that fit the memory limit."""
    best_family_makespan: float

    @property
    def gap(self) -> float:
        """How far the makespan is above the lower bound, as a share of it."""
        return max(0.0, self.makespan / self.lower_bound - 1) if self.lower_bound else 0.0


@lru_cache(maxsize=512)
def search(request: SearchRequest) -> SearchResult:
    """Return the best order found for `request`.

    Raises:
        ScheduleError: the limit leaves no room for one microbatch, or the costs do not fit the ranks.
    """
    if min(request.limits) < 1:
        raise ScheduleError(
            f"max_in_flight {min(request.limits):g} is below one microbatch, which every rank has to hold from its "
            "forward to its backward whatever the order; the smallest limit that an order fits is 1"
        )
    return _Search(request).run()


class _Search:
    def __init__(self, request: SearchRequest) -> None:
        self._budget = Budget(request.num_steps)
        self._request = request
        self._costs = {placement: request.costs(placement) for placement in request.placements}
        random = Random(0)
        self._fields = {
            placement: SearchField(
                SearchProblem(
                    placement, request.num_microbatches, costs, capacities(request.limits, placement.stages_per_rank)
                ),
                self._budget,
                random,
            )
            for placement, costs in self._costs.items()
        }

    def run(self) -> SearchResult:
        request = self._request
        families = fitting_families(
            request.num_ranks, request.num_microbatches, request.limits, request.stages_per_rank
        )
        timed = [(simulate(each.schedule, self._costs[each.schedule.placement]).makespan, each) for each in families]
        family_makespan, family = min(timed, key=lambda pair: pair[0])
        for _, each in timed:
            field = self._fields[each.schedule.placement]
            field.add(field.problem.read(each.schedule))
        for field in self._fields.values():
            field.try_policies(reserve=request.num_steps // 4)
        self._vary()
        self._improve()
        self._shake()
        schedule = self._write(min(self._fields.values(), key=lambda field: field.best))
        makespan = simulate(schedule, self._costs[schedule.placement]).makespan
        if makespan > family_makespan:
            schedule, makespan = replace(family.schedule, name=schedule.name), family_makespan
        bound = min(field.bound for field in self._fields.values())
        return SearchResult(schedule, makespan, bound, family.name, family_makespan)

    def _open(self) -> list[SearchField]:
        """Return the fields that may still hold something better than the best found in any."""
        best = min(field.best for field in self._fields.values())
        return [field for field in self._fields.values() if not field.is_done and field.bound < best * (1 - 1e-9)]

    def _vary(self) -> None:
        best = min(field.best for field in self._fields.values())
        fields = [field for field in self._open() if field.best <= best * _WORTH_IT]
        for field in fields:
            field.vary_policies(int(self._budget.left * _VARIED) // len(fields), _VARY_PATIENCE)

    def _improve(self) -> None:
        for _ in range(_ROUNDS):
            fields = self._open()
            if not fields:
                break
            field = min(fields, key=lambda field: min(field.next_seed(), field.best * _WORTH_IT))
            swaps = self._budget.left // field.swap_steps
            if swaps <= 0:
                break
            field.improve_next(swaps, _SWAP_PATIENCE)

    def _shake(self) -> None:
        end = self._budget.left - int(self._request.num_steps * _SHAKEN)
        turn = 0
        while self._budget.left > max(0, end):
            best = min(field.best for field in self._fields.values())
            fields = [field for field in self._open() if field.best <= best * _WORTH_SHAKING]
            if not fields:
                break
            fields[turn % len(fields)].shake()
            turn += 1

    def _write(self, field: SearchField) -> Schedule:
        orders = field.best_orders
        return field.problem.write("searched", orders, find_whole_backwards(field.problem, orders))
