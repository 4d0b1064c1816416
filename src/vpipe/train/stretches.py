"""How a run is cut into stretches, at whose ends the pipeline is empty, and which of its iterations are measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

__all__ = ["Stretch", "choose_measured", "cut_into_stretches"]

_LONGEST = 1000
"""Iterations after which a pipeline drains even if nothing asks for it: asynchronous schedules stay of some length."""

_MOST_MEASURED = 8
"""Iterations in the timeline and in the shares of busy and waiting time."""


class Stretch(NamedTuple):
    """Iterations `start` to `stop - 1`, counted from 0."""

    start: int
    stop: int

    @property
    def num_iterations(self) -> int:
        """Count the iterations."""
        return self.stop - self.start


def cut_into_stretches(total: int, eval_frequency: int) -> Iterator[Stretch]:
    """Yield the stretches of `total` iterations, an evaluation after every `eval_frequency` of them; 0 is none."""
    start = 0
    while start < total:
        stop = min(total, start + _LONGEST)
        if eval_frequency:
            stop = min(stop, (start // eval_frequency + 1) * eval_frequency)
        yield Stretch(start, stop)
        start = stop


def choose_measured(
    stretches: Sequence[Stretch], num_filling: int, is_short: Callable[[int], bool] = lambda iteration: False
) -> tuple[Stretch, Stretch]:
    """Return the stretch and, of it, the iterations in which a run shows what it does all the time: late ones.

    `num_filling` is the number of iterations during which an asynchronous pipeline fills, 0 for a synchronous one,
    which fills and drains in every iteration. Filling is left out, draining (the last iteration) and a run's first
    iteration as well, where there are others; so are those that are `short`, of a smaller batch.
    """
    wanted = num_filling + 3 if num_filling else 2
    long_enough = [stretch for stretch in stretches if stretch.num_iterations >= wanted]
    longest = max(stretch.num_iterations for stretch in stretches)
    chosen = (long_enough or [stretch for stretch in stretches if stretch.num_iterations == longest])[-1]
    skipped = num_filling or (1 if chosen.start == 0 else 0)
    first = min(chosen.start + skipped, chosen.stop - 1)
    stop = chosen.stop - 1 if num_filling and chosen.stop - first > 1 else chosen.stop
    return chosen, _whole(Stretch(max(first, stop - _MOST_MEASURED), stop), is_short)


def _whole(stretch: Stretch, is_short: Callable[[int], bool]) -> Stretch:
    """Return the longest part without short iterations, the latest of several; all where there is none."""
    found = stretch
    ends = [index for index in range(*stretch) if is_short(index)]
    for start, stop in pairwise([stretch.start - 1, *ends, stretch.stop]):
        part = Stretch(start + 1, stop)
        if part.num_iterations and (found is stretch or part.num_iterations >= found.num_iterations):
            found = part
    return found
