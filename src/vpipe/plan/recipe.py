"""The order of a run's actions, as a value: which schedule, of which sizes, with which options and moves.

This is the only place that builds the schedule of a run, for training and evaluation, one process and many, prediction
and report. What a run adds to a family's own order is in three passes, in this order: weight versions to host memory,
recomputation ahead of the gradient, activations to host memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Self

from vpipe.errors import PlanError, ScheduleError
from vpipe.plan.values import as_count, as_flag, as_numbers, as_whole_numbers
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.csv_file import check_csv_run
from vpipe.schedule.entry import Entry
from vpipe.schedule.families.warmup import default_depths
from vpipe.schedule.passes.offload import insert_offloads
from vpipe.schedule.passes.recompute_ahead import insert_recomputes
from vpipe.schedule.passes.version_moves import insert_version_moves
from vpipe.schedule.registry import build_schedule, find_entry
from vpipe.schedule.schedule import Schedule

__all__ = ["BESIDES", "OPTIONS", "Option", "RankTimes", "Recipe", "build_evaluation", "insert_passes"]

Stages = Sequence[int]


@dataclass(frozen=True)
class RankTimes:
    """The time of each rank's share of one microbatch, in any unit; None: 1 on every rank."""

    forward: Sequence[float] | None = None
    input_grad: Sequence[float] | None = None
    weight_grad: Sequence[float] | None = None

    def __post_init__(self) -> None:
        for item in fields(self):
            if (values := getattr(self, item.name)) is not None:
                object.__setattr__(self, item.name, _as_times(f"rank_times {item.name}", values))

    @classmethod
    def of(cls, times: Mapping[str, Sequence[float]]) -> RankTimes:
        """Make them of a mapping with these names.

        Raises:
            PlanError: a name is none of them.
        """
        known = [item.name for item in fields(cls)]
        if not isinstance(times, Mapping):
            raise PlanError(f"rank_times is {times!r}; give a mapping of {', '.join(known)} to a list each")
        if unknown := [name for name in times if name not in known]:
            raise PlanError(f"rank_times has '{unknown[0]}'; its times are {', '.join(known)}")
        return cls(**times)

    def to_dict(self) -> dict[str, list[float]]:
        """Return those that were given."""
        given = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: list(values) for name, values in given.items() if values is not None}


def _as_times(name: str, values: object) -> tuple[float, ...]:
    times = as_numbers(name, values)
    if not isinstance(times, tuple):
        raise PlanError(f"{name} is {times:g}; give a list with one time per rank")
    return times


@dataclass(frozen=True)
class Option:
    """An option of some schedules: the field of a `Recipe` that holds it, and what others call it."""

    name: str
    builder: str
    """The keyword of the builders that have it, by which a family is known to have it."""
    key: str
    """In a run's YAML, below `pipeline`, and in a plan file."""
    default: object
    per_stage: bool
    """Whether it lists a value for each stage."""


@dataclass(frozen=True)
class Recipe:
    """A schedule with its sizes, its options, and what is put into its order.

    `num_ranks` and `num_microbatches` may be left open until they are known; what builds a schedule needs them.
    """

    schedule: str = "1f1b"
    """A name from `vpipe schedule --list`, or a CSV file with an order of these sizes."""
    num_microbatches: int | None = None
    """Slices of a batch, by default two per rank; in `pipedream` each one is an update of its own."""
    num_ranks: int | None = None
    """Ranks in the pipeline; None: those that there are."""
    stages_per_rank: int | None = None
    """Stages that each rank holds; None: as the schedule has it, mostly 1."""
    depths: Stages | None = field(
        default=None, metadata={"builder": "depths", "key": "stage_to_depth_map", "per_stage": True}
    )
    """Warmup forwards per stage, more than the schedule's own hide latency."""
    macrobatch: bool = field(default=False, metadata={"builder": "microbatches_per_update"})
    """Asynchronous, but one update per batch and two weight versions (PipeDream-2BW)."""
    vertical_sync: bool = field(default=False, metadata={"builder": "vertical_sync"})
    """Asynchronous with one weight version per microbatch on all stages."""
    max_in_flight: float | Sequence[float] | None = field(default=None, metadata={"builder": "max_in_flight"})
    """For `searched`, microbatches that a rank may hold, one number or one per rank."""
    rank_times: RankTimes | Mapping[str, Sequence[float]] | None = field(default=None, metadata={"builder": "forward"})
    """For `searched`, `forward`, `input_grad` and `weight_grad` times of each rank."""
    recompute_ahead: Stages = field(default=(), metadata={"besides": "activations"})
    """Stages that compute again before the gradient arrives (R actions)."""
    swap_versions: bool | Stages = field(default=(), metadata={"besides": "weights"})
    """In asynchronous schedules, move weight versions that wait to host memory; for all stages, or those listed."""

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, str):
            raise PlanError(f"schedule is {self.schedule!r}; give a name from `vpipe schedule --list`, or a CSV file")
        for name in ("num_microbatches", "num_ranks", "stages_per_rank"):
            self._set(name, as_count(name, getattr(self, name)))
        for name in ("macrobatch", "vertical_sync"):
            as_flag(name, getattr(self, name))
        if self.depths is not None:
            self._set("depths", as_whole_numbers("depths", self.depths, "warmup forwards, one per stage"))
        self._set("recompute_ahead", as_whole_numbers("recompute_ahead", self.recompute_ahead, "stages"))
        if self.swap_versions is False:
            self._set("swap_versions", ())
        elif self.swap_versions is not True:
            self._set("swap_versions", as_whole_numbers("swap_versions", self.swap_versions, "stages"))
        if self.max_in_flight is not None:
            self._set("max_in_flight", as_numbers("max_in_flight", self.max_in_flight))
        if self.rank_times is not None and not isinstance(self.rank_times, RankTimes):
            self._set("rank_times", RankTimes.of(self.rank_times) if self.rank_times else None)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def entry(self) -> Entry:
        """Return what the registry knows of the schedule.

        Raises:
            ScheduleError: there is none of that name.
        """
        return find_entry(self.schedule)

    @property
    def synchronous(self) -> bool:
        """Tell whether the pipeline drains after each batch."""
        return self.entry.synchronous

    @property
    def options(self) -> dict[str, object]:
        """Return the options that are given, by name."""
        given = {option.name: getattr(self, option.name) for option in OPTIONS}
        return {name: value for name, value in given.items() if value is not None and value is not False}

    @property
    def swapping(self) -> frozenset[int]:
        """Return the stages whose activations move to host memory: a recipe by itself has no blocks that could."""
        return frozenset()

    def taken_by(self, entry: Entry) -> Self:
        """Return the recipe without the options that a family does not have."""
        lacking = [option for option in OPTIONS if option.builder not in entry.options]
        return replace(self, **{option.name: option.default for option in lacking})  # type: ignore[arg-type]

    def build(self, num_batches: int = 1) -> Schedule:
        """Build the order of so many batches, in which an asynchronous pipeline fills once and drains once.

        Raises:
            ScheduleError: the schedule cannot be built for these sizes and options.
            PlanError: the sizes are not known yet.
        """
        num_ranks, count = self.sizes
        if reasons := check_csv_run(self.schedule, synchronous=self.synchronous):
            raise ScheduleError(reasons[0])
        if self.macrobatch and self.synchronous:
            raise ScheduleError(
                f"macrobatch makes an asynchronous schedule update once per batch, which '{self.schedule}' does "
                "anyway; leave it out"
            )
        self._check_options()
        own = build_schedule(
            self.schedule,
            num_ranks,
            count * num_batches,
            stages_per_rank=self.stages_per_rank,
            **self._builder_options(count),
        )
        moving = self.swap_versions
        return insert_passes(
            own,
            ahead=self.recompute_ahead,
            swapping=self.swapping,
            swap_versions=(range(own.num_stages) if moving else ()) if isinstance(moving, bool) else moving,
        )

    def _check_options(self) -> None:
        """Refuse options that the family does not have, by the names that they have here."""
        known = [option.name for option in OPTIONS if option.builder in self.entry.options]
        for name in self.options:
            if name not in known:
                told = ", ".join(known) or "none"
                raise ScheduleError(f"schedule '{self.schedule}' has no option '{name}'; its options: {told}")

    @cached_property
    def sample(self) -> Schedule:
        """The order of one batch, or of an asynchronous schedule enough batches to show its steady state."""
        return self.build(1 if self.synchronous else self.num_batches_until_steady)

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the numbers of ranks and of microbatches.

        Raises:
            PlanError: one is not known yet.
        """
        if self.num_ranks is None or self.num_microbatches is None:
            missing = "num_ranks" if self.num_ranks is None else "num_microbatches"
            raise PlanError(f"the plan leaves {missing} open; resolve it, or give {missing}")
        return self.num_ranks, self.num_microbatches

    @property
    def num_batches_until_steady(self) -> int:
        """Count enough batches that every stage has more forwards than it runs ahead, and a few pairs."""
        if self.synchronous:
            return 2
        num_ranks, count = self.sizes
        deepest = max([num_ranks, *(self.depths or ())])
        return 2 + -(-2 * deepest // count)

    def deeper(self) -> list[Self]:
        """Return the same with warmups deeper than the least, which hide latency; none where that is not possible."""
        num_ranks, count = self.sizes
        if "depths" not in self.entry.options or self.depths is not None:
            return []
        least = default_depths([1] * num_ranks)
        deeper = ([depth + 1 for depth in least], [2 * depth + 1 for depth in least])
        return [replace(self, depths=tuple(depths)) for depths in deeper if max(depths) < count]

    @property
    def moving_versions(self) -> tuple[int, ...]:
        """Return the stages whose waiting weight versions move, as far as they are named."""
        return () if isinstance(self.swap_versions, bool) else tuple(self.swap_versions)

    def bare(self) -> Recipe:
        """Return the family's own order: nothing that stages do besides."""
        own = {item.name: getattr(self, item.name) for item in fields(Recipe) if item.name not in BESIDES}
        return Recipe(**own)

    def for_any_stages(self) -> Self:
        """Return the same without what is listed by stage or by rank, which is for one number of them."""
        listed = [item for item in fields(Recipe) if isinstance(getattr(self, item.name), Sequence | RankTimes)]
        kept = {item.name: item.default for item in listed if item.name != "schedule"}
        return replace(self, **kept)  # type: ignore[arg-type]

    def with_ahead(self, stages: Sequence[int]) -> Self:
        """Return the same with `stages` recomputing before the gradient arrives, and no others."""
        return replace(self, recompute_ahead=tuple(stages))

    def without_moves(self) -> Self:
        """Return the same with all weight versions on the device."""
        return replace(self, swap_versions=())

    def with_all_moves(self) -> Self:
        """Return the same with the weight versions of all stages moved."""
        return replace(self, swap_versions=True)

    def with_useful_moves(self) -> Self:
        """Return the same, naming those stages alone whose weight versions wait long enough to be moved."""
        if self.synchronous or not self.swap_versions:
            return self.without_moves()
        useful = {action.stage for order in self.sample.orders for action in order if action.kind is Kind.OFFLOAD_V}
        return replace(self, swap_versions=tuple(sorted(useful)))

    def describe(self, sizes: str) -> str:
        """Say the schedule, its sizes as given, and its options in a few words."""
        words = [self.schedule, sizes]
        if self.stages_per_rank is not None and self.stages_per_rank > 1:
            words.append(f"{self.stages_per_rank} stages per rank")
        if self.depths is not None:
            words.append(f"depths {' '.join(map(str, self.depths))}")
        if self.swap_versions:
            stages = "all stages" if self.swap_versions is True else f"stages {' '.join(map(str, self.swap_versions))}"
            words.append(f"older weights of {stages} in host memory")
        return ", ".join(words)

    def _builder_options(self, num_microbatches: int) -> dict[str, object]:
        given = self.options
        taken = {option.builder: given[option.name] for option in OPTIONS if option.name in given}
        if self.macrobatch:
            taken["microbatches_per_update"] = num_microbatches
        if isinstance(self.rank_times, RankTimes):
            del taken["forward"]
            taken |= self.rank_times.to_dict()
        return taken


OPTIONS = tuple(
    Option(
        item.name,
        item.metadata["builder"],
        item.metadata.get("key", item.name),
        item.default,
        item.metadata.get("per_stage", False),
    )
    for item in fields(Recipe)
    if "builder" in item.metadata
)
"""All options, in the order of their fields."""
BESIDES = {item.name: str(item.metadata["besides"]) for item in fields(Recipe) if "besides" in item.metadata}
"""What stages do besides, by its name in a run's YAML, below `plan`, and in a plan file; and to what they do it."""


def insert_passes(
    schedule: Schedule,
    *,
    ahead: Collection[int] = (),
    swapping: Collection[int] = (),
    swap_versions: Collection[int] = (),
) -> Schedule:
    """Return the schedule with what stages do besides: each argument names those that do it.

    Raises:
        ScheduleError: there is no such stage.
    """
    moving = insert_version_moves(schedule, swap_versions)
    recomputing = insert_recomputes(moving, ahead) if ahead else moving
    return insert_offloads(recomputing, swapping) if swapping else recomputing


def build_evaluation(schedule: Schedule, num_microbatches: int) -> Schedule:
    """Build forwards alone, of so many microbatches, on the stages of `schedule`."""
    placement = schedule.placement
    orders = tuple(
        tuple(Action(stage, Kind.F, index) for index in range(num_microbatches) for stage in placement.stages_of(rank))
        for rank in range(placement.num_ranks)
    )
    return Schedule("evaluation", num_microbatches, placement, orders)
