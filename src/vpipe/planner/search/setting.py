"""What a plan is made for: a schedule with its options, and how many microbatches a batch is cut into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from vpipe.errors import PlanError, ScheduleError
from vpipe.plan.recipe import Recipe
from vpipe.planner.profile.profile import Profile
from vpipe.schedule.registry import find_entry
from vpipe.schedule.schedule import Schedule

__all__ = ["Setting", "microbatch_choices", "settings", "sizes_to_profile"]


@dataclass(frozen=True)
class Setting:
    """A schedule of given sizes, and the samples in a microbatch."""

    recipe: Recipe
    microbatch_size: int

    @property
    def schedule(self) -> str:
        """The schedule's name."""
        return self.recipe.schedule

    @property
    def num_ranks(self) -> int:
        """Ranks in the pipeline."""
        return self.recipe.sizes[0]

    @property
    def num_microbatches(self) -> int:
        """Microbatches of one batch."""
        return self.recipe.sizes[1]

    @property
    def batch_size(self) -> int:
        """Samples in one batch."""
        return self.num_microbatches * self.microbatch_size

    @property
    def synchronous(self) -> bool:
        """Tell whether the pipeline drains after each batch."""
        return self.recipe.synchronous

    @property
    def moving(self) -> tuple[int, ...]:
        """Stages whose waiting weight versions are moved to host memory."""
        return self.recipe.moving_versions

    def build(self, num_batches: int = 1) -> Schedule:
        """Build the schedule of so many batches.

        Raises:
            ScheduleError: the family cannot run these sizes.
        """
        return self.recipe.build(num_batches)

    @property
    def num_batches_until_steady(self) -> int:
        """Count batches after which an asynchronous schedule repeats itself."""
        return self.recipe.num_batches_until_steady

    def describe(self) -> str:
        """Say it in a few words."""
        return self.recipe.describe(f"{self.num_microbatches} x {self.microbatch_size} samples")


def microbatch_choices(profile: Profile, batch_size: int) -> tuple[int, ...]:
    """Return the numbers of microbatches that cut a batch evenly into sizes that the profile tells about.

    Raises:
        PlanError: there is none.
    """
    low, high = profile.microbatch_sizes[0], profile.microbatch_sizes[-1]
    found = tuple(batch_size // size for size in range(high, low - 1, -1) if batch_size % size == 0)
    if not found:
        measured = ", ".join(map(str, profile.microbatch_sizes))
        raise PlanError(
            f"no number of microbatches cuts a batch of {batch_size} into microbatches of {measured} samples, which "
            "the profile is of; profile a size that divides the batch"
        )
    return found


def sizes_to_profile(num_ranks: int, batch_size: int) -> tuple[int, ...]:
    """Return up to three microbatch sizes, between which lie those worth choosing from.

    With fewer than two microbatches per rank, ranks wait for most of the time: such sizes are left out where others
    divide the batch.
    """
    sizes = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
    usual = [size for size in sizes if batch_size // size >= 2 * num_ranks] or sizes
    middle = min(usual, key=lambda size: abs(size * size - usual[0] * usual[-1]))
    return tuple(sorted({usual[0], middle, usual[-1]}))


def settings(
    base: Recipe,
    batch_size: int,
    schedules: Sequence[str],
    num_microbatches: Sequence[int],
    *,
    is_eager: bool,
    may_move_versions: bool = False,
) -> list[Setting]:
    """Return every combination that can be built; with `is_eager`, also warmups deeper than the least.

    `base` has the ranks, and the options and moves, of which each schedule takes those it has. With
    `may_move_versions`, settings are returned with weight versions that move and without.

    Raises:
        PlanError: the batch cannot be cut so.
        ScheduleError: none can be built; of one alone, the reason.
    """
    found, reasons = [], []
    for name, count in product(schedules, num_microbatches):
        if batch_size % count:
            raise PlanError(f"a batch of {batch_size} cannot be cut into {count} equal microbatches; use a divisor")
        own = replace(base.with_ahead(()), schedule=name, num_microbatches=count).taken_by(find_entry(name))
        for recipe in [own, *(own.deeper() if is_eager else ())]:
            try:
                recipe.without_moves().build()
                found += [Setting(each, batch_size // count) for each in _with_moves(recipe, may=may_move_versions)]
            except ScheduleError as error:
                reasons.append(error)
    if not found:
        raise reasons[0]
    return found


def _with_moves(recipe: Recipe, *, may: bool) -> list[Recipe]:
    """Return the recipe as asked for, naming those stages alone that have something to move; or both ways."""
    moving = (recipe.with_all_moves() if may else recipe).with_useful_moves()
    return [recipe.without_moves(), moving] if may and moving.moving_versions else [moving]
