"""What a plan is made for: a schedule with its options, and how many microbatches a batch is cut into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from vpipe.errors import PlanError, ScheduleError
from vpipe.planner.profile.profile import Profile
from vpipe.schedule.action import Kind
from vpipe.schedule.families.warmup import default_depths
from vpipe.schedule.passes.version_moves import insert_version_moves
from vpipe.schedule.registry import build_schedule, find_entry
from vpipe.schedule.schedule import Schedule

__all__ = ["Setting", "microbatch_choices", "settings", "sizes_to_profile"]


@dataclass(frozen=True)
class Setting:
    """A schedule of given sizes."""

    schedule: str
    num_ranks: int
    num_microbatches: int
    """Of one batch."""
    microbatch_size: int
    stages_per_rank: int | None = None
    options: tuple[tuple[str, Any], ...] = ()
    """Of the schedule's builder, by name."""
    swap_versions: tuple[int, ...] = ()
    """Stages whose waiting weight versions are moved to host memory."""

    @property
    def batch_size(self) -> int:
        """Samples in one batch."""
        return self.num_microbatches * self.microbatch_size

    @property
    def synchronous(self) -> bool:
        """Tell whether the pipeline drains after each batch."""
        return find_entry(self.schedule).synchronous

    @property
    def depths(self) -> tuple[int, ...] | None:
        """Warmup forwards per stage, where they are not the schedule's own."""
        found: tuple[int, ...] | None = dict(self.options).get("depths")
        return found

    def build(self, num_batches: int = 1) -> Schedule:
        """Build the schedule of so many batches.

        Raises:
            ScheduleError: the family cannot run these sizes.
        """
        count = self.num_microbatches * num_batches
        schedule = build_schedule(
            self.schedule, self.num_ranks, count, stages_per_rank=self.stages_per_rank, **dict(self.options)
        )
        return insert_version_moves(schedule, self.swap_versions)

    @property
    def num_batches_until_steady(self) -> int:
        """Count batches after which an asynchronous schedule repeats itself."""
        deepest = max([self.num_ranks, *(self.depths or ())])
        return 2 + -(-2 * deepest // self.num_microbatches)

    def describe(self) -> str:
        """Say it in a few words."""
        words = [f"{self.schedule}, {self.num_microbatches} x {self.microbatch_size} samples"]
        if self.stages_per_rank is not None and self.stages_per_rank > 1:
            words.append(f"{self.stages_per_rank} stages per rank")
        if self.depths is not None:
            words.append(f"depths {' '.join(map(str, self.depths))}")
        if self.swap_versions:
            words.append(f"older weights of stages {' '.join(map(str, self.swap_versions))} in host memory")
        return ", ".join(words)


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
    num_ranks: int,
    batch_size: int,
    schedules: Sequence[str],
    num_microbatches: Sequence[int],
    *,
    stages_per_rank: int | None,
    options: Mapping[str, Any],
    is_eager: bool,
) -> list[Setting]:
    """Return every combination that can be built; with `is_eager`, also warmups deeper than the least.

    Of `options` each schedule takes those it has. `macrobatch` makes one update of each batch; `swap_versions` moves
    weight versions that wait, on the stages listed or on all (True). None: both with and without.

    Raises:
        PlanError: the batch cannot be cut so.
        ScheduleError: none can be built; of one alone, the reason.
    """
    found, reasons = [], []
    for name, count in product(schedules, num_microbatches):
        if batch_size % count:
            raise PlanError(f"a batch of {batch_size} cannot be cut into {count} equal microbatches; use a divisor")
        for own in _options(name, num_ranks, count, options, is_eager=is_eager):
            setting = Setting(name, num_ranks, count, batch_size // count, stages_per_rank, tuple(sorted(own.items())))
            try:
                setting.build()
                found += _with_version_moves(setting, options.get("swap_versions", False))
            except ScheduleError as error:
                reasons.append(error)
    if not found:
        raise reasons[0]
    return found


def _with_version_moves(setting: Setting, asked: bool | Sequence[int] | None) -> list[Setting]:
    """Return the setting as asked for, naming those stages alone that have something to move; None: both ways."""
    if setting.synchronous or asked is False:
        return [setting]
    all_stages = range(setting.build().num_stages)
    stages = all_stages if asked is None or asked is True else asked
    schedule = replace(setting, swap_versions=tuple(stages)).build(setting.num_batches_until_steady)
    useful = {action.stage for order in schedule.orders for action in order if action.kind is Kind.OFFLOAD_V}
    moving = replace(setting, swap_versions=tuple(sorted(useful)))
    return [setting, moving] if asked is None and useful else [moving]


def _options(
    name: str, num_ranks: int, num_microbatches: int, options: Mapping[str, Any], *, is_eager: bool
) -> Iterator[dict[str, Any]]:
    known = find_entry(name).options
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items() if key in known}
    if options.get("macrobatch") and "microbatches_per_update" in known:
        own["microbatches_per_update"] = num_microbatches
    yield own
    if is_eager and "depths" in known and "depths" not in own:
        least = default_depths([1] * num_ranks)
        for deeper in ([depth + 1 for depth in least], [2 * depth + 1 for depth in least]):
            if max(deeper) < num_microbatches:
                yield own | {"depths": tuple(deeper)}
