"""What few microbatches cost: the share of the time that the ranks of a synchronous pipeline wait, and what helps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vpipe.errors import ScheduleError
from vpipe.plan.recipe import Recipe
from vpipe.schedule.simulate.simulate import simulate

__all__ = ["ENOUGH", "Waiting", "find_waiting"]

ENOUGH = 4
"""Microbatches per stage with which a pipeline is busy for most of the time."""


@dataclass(frozen=True)
class Waiting:
    """How long the ranks of a synchronous pipeline wait, by its schedule and with stages of equal time."""

    schedule: str
    num_stages: int
    num_ranks: int
    num_microbatches: int
    batch_size: int | None
    """Samples that are to be cut, as far as they are known."""
    share: float
    better: tuple[int, float] | None
    """Another number of microbatches, that for `ENOUGH` of them or else as many as there can be, and the share then."""

    @property
    def is_long(self) -> bool:
        """Tell whether there are fewer microbatches than are enough."""
        return self.num_microbatches < ENOUGH * self.num_stages

    def __str__(self) -> str:
        waits = f"each of {self.num_ranks} ranks waits for {self.share:.0%} of the time"
        return waits if not self.is_long else f"{waits} (stages of equal time); {self._advice()}"

    def _advice(self) -> str:
        if self.schedule.lower().endswith(".csv"):
            return "the order in the file has no more"
        if self.better is None:
            size, enough = self.batch_size, ENOUGH * self.num_stages
            return f"a batch of {size} cannot be cut into more; with a batch_size of {enough} it could flow as {enough}"
        number, share = self.better
        if share >= self.share:
            return f"with '{self.schedule}' more microbatches do not make that less"
        fits = "" if self.batch_size is None else f", which batch_size {self.batch_size} allows,"
        return f"num_microbatches = {number}{fits} makes it {share:.0%}"


def find_waiting(recipe: Recipe, batch_size: int | None = None) -> Waiting | None:
    """Return how long ranks wait in a recipe with its sizes; None where stages do not wait for a batch to end.

    `batch_size` restricts what is advised to what cuts it equally.

    Raises:
        ScheduleError, PlanError: the schedule cannot be built.
    """
    if not recipe.synchronous:
        return None
    own = recipe.bare()
    schedule = own.build()
    if schedule.num_stages == 1:
        return None
    (num_ranks, count), num_stages = own.sizes, schedule.num_stages
    better = None
    if count < ENOUGH * num_stages:
        better = next(_shares(own, _more(count, ENOUGH * num_stages, batch_size)), None)
    share = simulate(schedule).bubble_fraction
    return Waiting(own.schedule, num_stages, num_ranks, count, batch_size, share, better)


def _more(count: int, enough: int, batch_size: int | None) -> list[int]:
    """Return larger numbers than `count`, best first: the smallest that is enough, else the largest."""
    if batch_size is None:
        return [enough]
    larger = [number for number in range(count + 1, batch_size + 1) if batch_size % number == 0]
    return sorted(larger, key=lambda number: (0, number) if number >= enough else (1, -number))


def _shares(recipe: Recipe, counts: list[int]) -> Iterator[tuple[int, float]]:
    """Yield those of `counts` for which the schedule can be built, each with the share of waiting."""
    for count in counts:
        try:
            schedule = replace(recipe, num_microbatches=count).build()
        except ScheduleError:
            continue
        yield count, simulate(schedule).bubble_fraction
