"""The search in one placement: the orders tried there so far, the best policies, and what no order there can beat."""

from __future__ import annotations

import math
from random import Random

from vpipe.errors import ScheduleError
from vpipe.schedule.search.bounds import lower_bound
from vpipe.schedule.search.improve import improve
from vpipe.schedule.search.list import ListPolicy, build_list_order
from vpipe.schedule.search.problem import Orders, SearchProblem
from vpipe.schedule.search.seeds import table_of_policies, vary
from vpipe.schedule.search.shake import shake
from vpipe.schedule.search.timing import Timing

__all__ = ["Budget", "SearchField"]

_LIST_STEPS = 4  # what a list schedule costs per operation; timing orders once, or swapping two operations, costs 1
_FIXED_STEPS = 50  # what anything costs, however few operations there are
_LEAST_POLICIES = 6
_NUM_CHANGES = 3
_SHAKEN_PATIENCE = 60


class Budget:
    """Steps that are left; a step is the time to place one operation, about half a microsecond."""

    def __init__(self, num_steps: int) -> None:
        self.left = num_steps

    def take(self, num_steps: int) -> None:
        """Spend `num_steps`."""
        self.left -= num_steps


class SearchField:
    """One placement."""

    def __init__(self, problem: SearchProblem, budget: Budget, random: Random) -> None:
        self.problem = problem
        self.bound = lower_bound(problem)
        self.swap_steps = problem.num_operations + _FIXED_STEPS
        self._goal = math.floor(self.bound / problem.unit) + problem.num_operations  # whole numbers were rounded
        self._budget = budget
        self._random = random
        self._timing = Timing(problem)
        self._orders: dict[int, Orders] = {}  # by makespan, the first one that has it
        self._unused: list[int] = []  # makespans of orders that were not improved yet
        self._policy: tuple[int, ListPolicy] | None = None

    @property
    def best(self) -> float:
        """The best makespan so far."""
        return min(self._orders, default=math.inf) * self.problem.unit

    @property
    def best_orders(self) -> Orders:
        """The orders that have it."""
        return self._orders[min(self._orders)]

    @property
    def is_done(self) -> bool:
        """Whether no order of this placement can be better."""
        return min(self._orders, default=math.inf) <= self._goal

    def add(self, orders: Orders) -> int:
        """Try `orders` and return their makespan.

        Raises:
            ScheduleError: their ranks wait for each other.
        """
        self._budget.take(self.swap_steps)
        if not self._timing.run(orders):
            raise ScheduleError("the search was given orders whose ranks wait for each other")
        makespan = self._timing.makespan
        if makespan not in self._orders:
            self._orders[makespan] = orders
            self._unused.append(makespan)
        return makespan

    def try_policies(self, reserve: int) -> None:
        """Try the table of policies, the first ones whatever the budget."""
        for number, policy in enumerate(table_of_policies(self.problem)):
            if self.is_done or (number >= _LEAST_POLICIES and self._budget.left < reserve):
                break
            makespan = self._try(policy)
            if makespan is not None and (self._policy is None or makespan < self._policy[0]):
                self._policy = makespan, policy

    def vary_policies(self, num_steps: int, patience: int) -> None:
        """Vary the best policy for `num_steps`, or until nothing better came for `patience` times."""
        end, stale = self._budget.left - num_steps, 0
        while self._policy is not None and self._budget.left > end and stale < patience and not self.is_done:
            makespan, policy = self._policy
            varied = vary(self.problem, policy, self._random)
            stale += 1
            if varied == policy:
                continue
            tried = self._try(varied)
            if tried is not None and tried <= makespan:
                self._policy = tried, varied
                stale = 0 if tried < makespan else stale

    def _try(self, policy: ListPolicy) -> int | None:
        self._budget.take((_LIST_STEPS - 1) * self.problem.num_operations)
        orders = build_list_order(self.problem, policy)
        return None if orders is None else self.add(orders)

    def next_seed(self) -> float:
        """Return the makespan of the best orders that were not improved yet."""
        return min(self._unused, default=math.inf) * self.problem.unit

    def improve_next(self, num_swaps: int, patience: int) -> None:
        """Improve the best orders that were not improved yet, or the best of all once more."""
        makespan = min(self._unused, default=min(self._orders))
        if self._unused:
            self._unused.remove(makespan)
        orders, improved, swaps = improve(
            self.problem, self._orders[makespan], num_swaps, self._random, self._goal, patience
        )
        self._budget.take(swaps * self.swap_steps)
        self._orders.setdefault(improved, orders)

    def shake(self) -> None:
        """Improve a random change of the best orders; what is as good takes their place."""
        makespan = min(self._orders)
        changed = shake(self.problem, self._orders[makespan], _NUM_CHANGES, self._random)
        num_swaps = max(1, self._budget.left // self.swap_steps)
        orders, improved, swaps = improve(self.problem, changed, num_swaps, self._random, self._goal, _SHAKEN_PATIENCE)
        self._budget.take((swaps + 2 * _NUM_CHANGES) * self.swap_steps)
        if improved <= makespan:
            self._orders[improved] = orders
