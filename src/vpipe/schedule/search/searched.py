"""Searched: the best order that a search finds for the costs and the memory that are there.

Idea: the families are made for equal stages; with unequal ones, or memory between two families' needs, a better order
is nearly always there to be found. The search starts from every family that fits the memory and from list schedules,
and swaps neighbours on the longest path (tabu search). So it is at least as good as the best family, by construction,
and a lower bound says how far it can be from the best order there is.

`max_in_flight` counts as `peak_activations` does: microbatches in whole-rank units, held from their forward to their
(weight) gradient; two stages on a rank count one half each. One number, or one per rank; by default p, what 1F1B needs.
Times are a rank's share of one microbatch, one number or one per rank, split evenly over its stages; by default all 1.
Unless `stages_per_rank` is given, one stage per rank competes with two, in a V and in a loop.

Closed form: none; at most the best of the hand-made families that hold no more than the limit.

Source: the bound and the use of memory follow Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024; the search is
that of Nowicki and Smutnicki, "A Fast Taboo Search Algorithm for the Job Shop Problem", 1996.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vpipe.errors import ScheduleError
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.search.search import DEFAULT_STEPS, SearchRequest, search

__all__ = ["build_searched", "make_request"]

_PerRank = float | Sequence[float]


def build_searched(
    num_ranks: int,
    num_microbatches: int,
    *,
    stages_per_rank: int | None = None,
    max_in_flight: _PerRank | None = None,
    forward: _PerRank = 1.0,
    input_grad: _PerRank = 1.0,
    weight_grad: _PerRank = 1.0,
    step: _PerRank = 0.0,
    dispatch: float = 0.0,
    latency: float = 0.0,
    bandwidth: float = math.inf,
    message_bytes: float = 0.0,
    search_steps: int = DEFAULT_STEPS,
) -> Schedule:
    """Search for the shortest order that holds at most `max_in_flight` microbatches on any rank.

    The same arguments give the same order, on every machine: the search ends after `search_steps` (about half a
    microsecond each, a few seconds in all for the largest pipelines), not after a time.

    Raises:
        ScheduleError: a limit below 1, which no order fits, or costs that do not fit the ranks.
    """
    request = make_request(
        num_ranks,
        num_microbatches,
        stages_per_rank=stages_per_rank,
        max_in_flight=max_in_flight,
        search_steps=search_steps,
        forward=forward,
        input_grad=input_grad,
        weight_grad=weight_grad,
        step=step,
        dispatch=dispatch,
        latency=latency,
        bandwidth=bandwidth,
        message_bytes=message_bytes,
    )
    return search(request).schedule


def make_request(
    num_ranks: int,
    num_microbatches: int,
    *,
    stages_per_rank: int | None = None,
    max_in_flight: _PerRank | None = None,
    search_steps: int = DEFAULT_STEPS,
    **times: _PerRank,
) -> SearchRequest:
    """Return what `build_searched` searches for when it is given these arguments.

    Raises:
        ScheduleError: not one limit per rank, or one that is no number.
    """
    limits = num_ranks if max_in_flight is None else max_in_flight
    per_rank = (float(limits),) * num_ranks if isinstance(limits, int | float) else tuple(map(float, limits))
    if len(per_rank) != num_ranks:
        raise ScheduleError(f"max_in_flight has {len(per_rank)} numbers for {num_ranks} ranks; give one per rank")
    if any(math.isnan(limit) for limit in per_rank):
        raise ScheduleError(f"max_in_flight must be a number of microbatches, got {max_in_flight}")
    frozen = ((name, time if isinstance(time, int | float) else tuple(time)) for name, time in sorted(times.items()))
    # More than the whole batch is never held.
    held = tuple(min(limit, float(num_microbatches)) for limit in per_rank)
    return SearchRequest(num_ranks, num_microbatches, held, stages_per_rank, tuple(frozen), search_steps)
