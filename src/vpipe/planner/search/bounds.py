"""What no plan can beat: a lower bound on the time of a batch, to tell how good the plan that was found is."""

from __future__ import annotations

from itertools import takewhile
from math import inf

import numpy as np

from vpipe.planner.cost.costs import Array
from vpipe.planner.cut.exact import cut_minimax
from vpipe.planner.search.situation import Situation
from vpipe.schedule.action import Kind
from vpipe.schedule.schedule import uses_split_backward

__all__ = ["lower_bound_ms"]


def lower_bound_ms(situation: Situation) -> float:
    """Return a time that no cut and no policies can bring a batch below, in this setting under its limits.

    With one stage per rank, whatever the cut, a stage with blocks i to j - 1 is busy with all microbatches of these;
    before its first forward the earlier blocks run forward, and after its last backward (in a synchronous schedule)
    backward, each at best on the fastest rank. Also, of its forwards only those that the schedule has before its first
    backward can hide the way of the first microbatch to the end of the pipeline and back. The smallest bound over all
    cuts comes from the same programme as the cut itself. With several stages per rank: all work, spread over all ranks.
    """
    setting, chain, times = situation.setting, situation.chain, situation.times
    if situation.schedule.placement.stages_per_rank > 1:
        speeds = situation.speeds[: setting.num_ranks]
        work = float(chain.compute_ms[0, -1]) / sum(speeds)
        largest = float(np.diagonal(chain.compute_ms, 1).max()) / max(speeds)
        return setting.num_microbatches * max(work, largest)
    # Times that depend on choices which may have been left out would be no bound.
    # Nor is it known beside how many of a stage's copies it computes.
    known = _with_unknown(situation) if times.is_exact and not chain.host_share else times.optimistic
    if not setting.synchronous:
        return setting.num_microbatches * cut_minimax(known)[0]
    around, after = _elsewhere(situation)
    per_speed = {speed: _work(situation, speed) for speed in set(situation.speeds)}
    bounds = []
    for stage, matrix in enumerate(known):
        forward, whole = per_speed[situation.speeds[stage]]
        first_way = after[None, :] + forward + np.maximum(0.0, whole - _num_ahead(situation, stage) * forward)
        bounds.append(around[:, None] + np.maximum(setting.num_microbatches * matrix, first_way))
    return cut_minimax(bounds)[0]


def _work(situation: Situation, speed: float) -> tuple[Array, Array]:
    """Return what a stage computes forward for one microbatch, and in all for a batch."""
    chain, count = situation.chain, situation.setting.num_microbatches
    forward = chain.between("forward_ms") / speed + situation.profile.dispatch_ms
    return forward, count * (chain.compute_ms / speed + chain.dispatch_ms)


def _elsewhere(situation: Situation) -> tuple[Array, Array]:
    """Return what a batch takes before and after a stage that starts at i, and the way behind one that ends at j."""
    chain, fastest = situation.chain, max(situation.speeds)
    there, back = chain.sums("forward_ms") / fastest, chain.sums("input_grad_ms") / fastest
    if uses_split_backward(situation.schedule):
        last = np.zeros_like(back)  # the last weight gradients may run while the earlier ranks finish
    else:
        back = last = back + chain.sums("weight_grad_ms") / fastest
    return np.append(there[:-1] + last[:-1], inf), there[-1] - there + back[-1] - back


def _num_ahead(situation: Situation, stage: int) -> int:
    """Count the forwards that the schedule has before the stage's first backward."""
    kinds = (action.kind for action in situation.schedule.stage_order(stage))
    return len(list(takewhile(lambda kind: kind is Kind.F, kinds)))


def _with_unknown(situation: Situation) -> list[Array]:
    """Return the stages' shortest times; an interval whose time is not known counts with what no policies can beat."""
    times = situation.times
    value, _, matrices = times.best
    if not times.has_policies or value == inf:
        return matrices
    return [
        np.where(np.isfinite(matrix), matrix, optimistic)
        for matrix, optimistic in zip(matrices, times.optimistic, strict=True)
    ]
