"""From a schedule's name and options to the programs that a rank executes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from vpipe.errors import ScheduleError
from vpipe.runtime.executor import Program
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.csv_file import check_csv_run
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.passes.lower import lower
from vpipe.schedule.passes.offload import insert_offloads
from vpipe.schedule.passes.recompute_ahead import insert_recomputes
from vpipe.schedule.passes.version_moves import insert_version_moves
from vpipe.schedule.proof.validate import validate_schedule
from vpipe.schedule.registry import build_schedule, find_entry
from vpipe.schedule.schedule import Schedule, uses_split_backward
from vpipe.schedule.weights import weight_usage

__all__ = ["ProgramBuilder"]


class ProgramBuilder:
    """Builds what `rank` does for one batch (synchronous) or for all batches until the pipeline drains (asynchronous).

    `macrobatch` makes one update of each batch in an asynchronous schedule, instead of one per microbatch.
    `stages_per_rank` is the schedule's own where it is None.

    Raises:
        ScheduleError: the schedule cannot be built for these sizes and options, or would not be legal.
    """

    def __init__(
        self,
        name: str,
        num_ranks: int,
        rank: int,
        num_microbatches: int,
        *,
        stages_per_rank: int | None = None,
        macrobatch: bool = False,
        options: Mapping[str, object],
    ) -> None:
        self.synchronous = find_entry(name).synchronous
        if reasons := check_csv_run(name, synchronous=self.synchronous):
            raise ScheduleError(reasons[0])
        self.num_microbatches = num_microbatches
        self._name = name
        self._num_ranks = num_ranks
        self._rank = rank
        self._stages_per_rank = stages_per_rank
        self._options = dict(options)
        if macrobatch and self.synchronous:
            raise ScheduleError(
                f"macrobatch makes an asynchronous schedule update once per batch, which '{name}' does anyway; "
                "leave it out"
            )
        if macrobatch:
            self._options["microbatches_per_update"] = num_microbatches
        self._ahead: frozenset[int] = frozenset()
        self._moved: frozenset[int] = frozenset()
        self._versions: frozenset[int] = frozenset()
        self._latest: tuple[int, Program] | None = None
        self.sample = self.schedule(1)
        """A schedule of one batch, or of enough batches to show an asynchronous schedule's steady state."""
        if not self.synchronous:
            self.sample = self.schedule(self.num_batches_until_steady)
        # A longer asynchronous schedule repeats the steady state of this one.
        validate_schedule(self.sample)
        self.microbatches_per_update = self._count_microbatches_per_update()

    @property
    def num_batches_until_steady(self) -> int:
        """Count enough batches that every stage has more forwards than it runs ahead, and a few pairs."""
        if self.synchronous:
            return 2
        depths = self._options.get("depths")
        deepest: int = max([self.sample.num_stages, *(depths if isinstance(depths, list | tuple) else ())])
        return 2 + -(-2 * deepest // self.num_microbatches)

    def _count_microbatches_per_update(self) -> int:
        count = weight_usage(self.sample)[0].update_of.count(0)
        if self.num_microbatches % count:
            raise ScheduleError(
                f"schedule '{self._name}' updates after every {count} microbatches, which do not divide a batch of "
                f"num_microbatches={self.num_microbatches}; use a multiple of {count}"
            )
        return count

    def schedule(self, num_batches: int) -> Schedule:
        """Build the schedule of `num_batches` batches."""
        count = self.num_microbatches * num_batches
        schedule = build_schedule(
            self._name, self._num_ranks, count, stages_per_rank=self._stages_per_rank, **self._options
        )
        moving = insert_version_moves(schedule, self._versions)
        return insert_offloads(insert_recomputes(moving, self._ahead), self._moved)

    def insert(self, ahead: Collection[int], swapping: Collection[int], versions: Collection[int] | bool) -> None:
        """From now on recompute ahead of the backwards of the stages `ahead`, and move what those `swapping` hold.

        Of the stages `versions` (True: of all) move those weight versions that wait.

        Raises:
            ScheduleError: there is no such stage.
        """
        if isinstance(versions, bool):
            versions = range(self.sample.num_stages) if versions else ()
        if not ahead and not swapping and not versions:
            return
        self._ahead, self._moved, self._versions = frozenset(ahead), frozenset(swapping), frozenset(versions)
        self._latest = None
        self.sample = self.schedule(self.sample.num_microbatches // self.num_microbatches)
        validate_schedule(self.sample)

    def facts(self) -> dict[str, object]:
        """Return what ranks must agree on."""
        name, fingerprint = self.sample.name, self.sample.fingerprint()
        return {"schedule": f"{name} with {self.num_microbatches} microbatches ({fingerprint})"}

    @property
    def swapping(self) -> frozenset[int]:
        """Name the stages whose activations are moved: those that hold enough of them for that to be of use."""
        return self._stages_with(Kind.OFFLOAD)

    @property
    def moving(self) -> frozenset[int]:
        """Name the stages whose weight versions are moved: those that keep enough of them for that to be of use."""
        return self._stages_with(Kind.OFFLOAD_V)

    def _stages_with(self, kind: Kind) -> frozenset[int]:
        return frozenset(action.stage for order in self.sample.orders for action in order if action.kind is kind)

    def training(self, num_batches: int, first_iteration: int) -> Program:
        """Return the program of `num_batches` batches; a synchronous one is of a single batch."""
        if self._latest is None or self._latest[0] != num_batches:
            self._latest = num_batches, self._program(self.schedule(1 if self.synchronous else num_batches))
        return replace(self._latest[1], first_iteration=first_iteration)

    def _program(self, schedule: Schedule) -> Program:
        return Program(
            actions=lower(schedule)[self._rank],
            weights=dict(enumerate(weight_usage(schedule))),
            num_microbatches=self.num_microbatches,
            microbatches_per_update=self.microbatches_per_update,
            first_iteration=0,
            num_serials=schedule.num_microbatches,
            window=_window(schedule),
            split=uses_split_backward(schedule),
        )

    @property
    def window(self) -> int:
        """Count the microbatches that are in flight on any stage at most, in training."""
        return _window(self.sample)

    def evaluation(self, numbers: Sequence[int]) -> Program:
        """Return a program of forwards only, for microbatches that have `numbers` in the whole evaluation."""
        placement, num_microbatches = self.sample.placement, len(numbers)
        orders = tuple(
            tuple(
                Action(stage, Kind.F, index) for index in range(num_microbatches) for stage in placement.stages_of(rank)
            )
            for rank in range(self._num_ranks)
        )
        schedule = Schedule("evaluation", num_microbatches, placement, orders)
        return Program(
            actions=lower(schedule)[self._rank],
            weights={},
            num_microbatches=1,
            microbatches_per_update=1,
            first_iteration=0,
            num_serials=num_microbatches,
            window=placement.num_stages,
            training=False,
            numbers=tuple(numbers),
        )


def _window(schedule: Schedule) -> int:
    return round(max(peak_activations(schedule)) * schedule.placement.stages_per_rank)
