"""From a recipe to the programs that a rank executes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vpipe.errors import ScheduleError
from vpipe.plan.recipe import Recipe, build_evaluation
from vpipe.runtime.executor import Program
from vpipe.schedule.action import Kind
from vpipe.schedule.memory import peak_activations, stage_activations
from vpipe.schedule.passes.lower import lower
from vpipe.schedule.proof.validate import validate_schedule
from vpipe.schedule.schedule import Schedule, uses_split_backward
from vpipe.schedule.weights import weight_usage

__all__ = ["ProgramBuilder"]


class ProgramBuilder:
    """Builds what `rank` does for one batch (synchronous) or for all batches until the pipeline drains (asynchronous).

    `recipe` has all of its sizes.

    Raises:
        ScheduleError: the schedule cannot be built for these sizes and options, or would not be legal.
    """

    def __init__(self, recipe: Recipe, rank: int) -> None:
        self.recipe = recipe
        _, self.num_microbatches = recipe.sizes
        self.synchronous = recipe.synchronous
        self._rank = rank
        self._latest: tuple[int, Program] | None = None
        self.sample = recipe.sample
        # A longer asynchronous schedule repeats the steady state of this one.
        validate_schedule(self.sample)
        self.update_size = self._count_update_size()
        in_flight = stage_activations(self.sample)
        self._lead = in_flight[0] - max(in_flight[stage] for stage in self.sample.placement.stages_of(rank))

    def _count_update_size(self) -> int:
        count = weight_usage(self.sample)[0].update_of.count(0)
        if self.num_microbatches % count:
            raise ScheduleError(
                f"schedule '{self.recipe.schedule}' updates after every {count} microbatches, which do not divide a "
                f"batch of num_microbatches={self.num_microbatches}; use a multiple of {count}"
            )
        return count

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
            self._latest = num_batches, self._program(self.recipe.build(1 if self.synchronous else num_batches))
        return replace(self._latest[1], first_iteration=first_iteration)

    def _program(self, schedule: Schedule) -> Program:
        return Program(
            actions=lower(schedule)[self._rank],
            weights=dict(enumerate(weight_usage(schedule))),
            num_microbatches=self.num_microbatches,
            update_size=self.update_size,
            first_iteration=0,
            num_serials=schedule.num_microbatches,
            window=_window(schedule),
            split=uses_split_backward(schedule),
            lead=self._lead,
        )

    @property
    def window(self) -> int:
        """Count the microbatches that are in flight on any stage at most, in training."""
        return _window(self.sample)

    def evaluation(self, numbers: Sequence[int]) -> Program:
        """Return a program of forwards only, for microbatches that have `numbers` in the whole evaluation."""
        schedule = build_evaluation(self.sample, len(numbers))
        return Program(
            actions=lower(schedule)[self._rank],
            weights={},
            num_microbatches=1,
            update_size=1,
            first_iteration=0,
            num_serials=len(numbers),
            window=schedule.num_stages,
            training=False,
            numbers=tuple(numbers),
            lead=len(numbers),
        )


def _window(schedule: Schedule) -> int:
    return round(max(peak_activations(schedule)) * schedule.placement.stages_per_rank)
