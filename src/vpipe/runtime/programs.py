"""From a schedule's name and options to the programs that a rank executes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

from vpipe.runtime.executor import Program
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.lower import lower
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.registry import build_schedule, find_entry
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.validate import validate_schedule
from vpipe.schedule.weights import weight_usage

__all__ = ["ProgramBuilder"]

_BATCHES_VALIDATED = 4


class ProgramBuilder:
    """Builds what `rank` does for one batch (synchronous) or for all batches until the pipeline drains (asynchronous).

    `macrobatch` makes one update of each batch in an asynchronous schedule, instead of one per microbatch.

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
        stages_per_rank: int = 1,
        macrobatch: bool = False,
        options: Mapping[str, object],
    ) -> None:
        self.synchronous = find_entry(name).synchronous
        self.num_microbatches = num_microbatches
        self.microbatches_per_update = num_microbatches if self.synchronous or macrobatch else 1
        self._name = name
        self._num_ranks = num_ranks
        self._rank = rank
        self._stages_per_rank = stages_per_rank
        self._options = dict(options)
        if macrobatch:
            self._options["microbatches_per_update"] = num_microbatches
        self._num_stages = num_ranks * stages_per_rank
        self.sample = self.schedule(1 if self.synchronous else _BATCHES_VALIDATED)
        # A longer asynchronous schedule repeats the steady state of this one.
        validate_schedule(self.sample)

    def schedule(self, num_batches: int) -> Schedule:
        """Build the schedule of `num_batches` batches."""
        count = self.num_microbatches * num_batches
        return build_schedule(
            self._name, self._num_ranks, count, stages_per_rank=self._stages_per_rank, **self._options
        )

    @cached_property
    def _one_batch(self) -> Program:
        return self._program(self.sample, 0)

    def training(self, num_batches: int, first_iteration: int) -> Program:
        """Return the program of `num_batches` batches; a synchronous one is of a single batch."""
        if self.synchronous:
            return replace(self._one_batch, first_iteration=first_iteration)
        return self._program(self.schedule(num_batches), first_iteration)

    def _program(self, schedule: Schedule, first_iteration: int) -> Program:
        return Program(
            actions=lower(schedule)[self._rank],
            weights=dict(enumerate(weight_usage(schedule))),
            num_microbatches=self.num_microbatches,
            microbatches_per_update=self.microbatches_per_update,
            first_iteration=first_iteration,
            num_serials=schedule.num_microbatches,
            window=round(max(peak_activations(schedule)) * self._stages_per_rank),
        )

    def evaluation(self, num_microbatches: int) -> Program:
        """Return a program of forwards only, for batches of one microbatch each."""
        placement = self.sample.placement
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
            window=self._num_stages,
            training=False,
        )
