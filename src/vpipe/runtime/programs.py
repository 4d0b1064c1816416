"""From a recipe to the programs that a rank executes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from vpipe.errors import ScheduleError
from vpipe.plan.recipe import Recipe, build_evaluation
from vpipe.plan.waiting import find_waiting
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.memory import peak_activations, stage_activations
from vpipe.schedule.passes.lower import lower
from vpipe.schedule.proof.validate import validate_schedule
from vpipe.schedule.schedule import Schedule, uses_split_backward
from vpipe.schedule.weights import StageWeights, weight_usage

__all__ = ["Program", "ProgramBuilder"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    """What one rank does from one drained pipeline to the next.

    `num_microbatches` is a batch's, and `update_size`, which divides it, an update's. A program that only
    evaluates has forwards alone, and keeps nothing. Microbatches are numbered through all batches of the program,
    `num_serials` in all, of which at most `window` are in flight on any stage.
    """

    actions: tuple[Action, ...]
    weights: Mapping[int, StageWeights]
    num_microbatches: int
    update_size: int
    first_iteration: int
    num_serials: int
    window: int
    training: bool = True
    split: bool = False
    """Whether there are backwards in two halves."""
    lead: int = 0
    """Microbatches by which the first stage is ahead of this rank's: their batches may be read before their time."""
    numbers: tuple[int, ...] = ()
    """Of an evaluation, the number of each microbatch in the whole of it, which may take several programs."""
    keeps_outputs: bool = False
    """Whether what the last block writes is kept; without training nothing else is computed then."""

    @property
    def num_batches(self) -> int:
        """Count the batches."""
        return self.num_serials // self.num_microbatches

    @property
    def compares_batches(self) -> bool:
        """Tell whether ranks look first if they were given the same batch: the 1st, 2nd, 3rd, 5th, 9th and so on.

        What drifts is found before training has gone on for twice as long. In a program of many batches the first is.
        """
        return self.training and (self.num_batches > 1 or not self.first_iteration & (self.first_iteration - 1))

    def serials_of(self, batch: int) -> range:
        """Return the numbers of a batch's microbatches."""
        return range(batch * self.num_microbatches, (batch + 1) * self.num_microbatches)

    def progress_of(self, stage: int, serial: int) -> float:
        """Return the iterations done before the update that ends with a microbatch; between batches a fraction."""
        share = self.update_size / self.num_microbatches
        return self.first_iteration + self.weights[stage].update_of[serial] * share

    def place_of(self, serial: int) -> tuple[int, int]:
        """Return what random numbers depend on: iteration and index in the batch, or the number in an evaluation."""
        if not self.training:
            return self.numbers[serial], 0
        batch, index = divmod(serial, self.num_microbatches)
        return self.first_iteration + batch, index


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
        if rank == 0 and logger.isEnabledFor(logging.INFO):
            self._tell_waiting()

    def _tell_waiting(self) -> None:
        waiting = find_waiting(self.recipe)
        if waiting is not None and waiting.is_long:
            logger.info("With num_microbatches = %d %s", waiting.num_microbatches, waiting)

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

    def training(self, num_batches: int, first_iteration: int, *, keeps_outputs: bool = False) -> Program:
        """Return the program of `num_batches` batches; a synchronous one is of a single batch."""
        if self._latest is None or self._latest[0] != num_batches:
            self._latest = num_batches, self._program(self.recipe.build(1 if self.synchronous else num_batches))
        return replace(self._latest[1], first_iteration=first_iteration, keeps_outputs=keeps_outputs)

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

    def evaluation(self, numbers: Sequence[int], *, keeps_outputs: bool = False) -> Program:
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
            keeps_outputs=keeps_outputs,
            lead=len(numbers),
        )


def _window(schedule: Schedule) -> int:
    return round(max(peak_activations(schedule)) * schedule.placement.stages_per_rank)
