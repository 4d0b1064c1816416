"""What no order can beat: lower bounds of the makespan, for one placement, its costs and the memory of each rank.

Notation, for a rank: `work`, everything it computes in m microbatches; `head`, the way from the start to its lowest
stage; `path` of a stage, from the end of a forward to the start of the same microbatch's input gradient, all other
ranks being free; `drain`, what is left to do elsewhere after the rank's last input gradient, which is one of its lowest
stage; `room`, the microbatches of one stage that it may hold. Then no rank ends before

- ``head + work`` and its updates: it computes one thing at a time;
- that, plus the idle time while it fills (until the first gradient comes it has only `room` forwards to run), plus the
  idle time while it drains (after the last input gradient it has at most `room` weight gradients left);
- ``head + m(F + I) + max(0, m - room) W + drain``: before the last forward, memory has forced that many weight
  gradients;
- for each stage, ``head + q x residency`` and the way through of what is left, with ``q = (m - 1) // room``: forward
  k + room waits for weight gradient k, and a microbatch keeps its place for at least ``residency = F + path + I + W``;
- the same on a rank of two stages with ``q = (m - 1) // (room - 1)`` for the lower one: were all places taken by
  microbatches that have yet to go through the upper stage, none of them could ever leave; so forward k + room - 1 waits
  until microbatch k has left the lower or the upper stage;
- ``head + m x (sum of residencies) / room``: places are occupied for that long altogether.

The first and the third are the bounds of Qi et al. (ICLR 2024) with memory in; the rest counts occupied places.
"""

from __future__ import annotations

from itertools import accumulate

from vpipe.schedule.action import Kind
from vpipe.schedule.search.problem import SearchProblem

__all__ = ["lower_bound"]


def lower_bound(problem: SearchProblem) -> float:
    """Return a makespan that no order of `problem` beats, in the unit of the costs."""
    costs = _StageTimes(problem)
    return max(max(_rank_bounds(problem, costs, rank)) for rank in range(problem.placement.num_ranks))


class _StageTimes:
    """Per stage: times of one microbatch, the ways to it and through what lies behind it."""

    def __init__(self, problem: SearchProblem) -> None:
        placement = problem.placement
        times = problem.costs.durations(placement.num_stages)
        forward, backward = problem.costs.hops(placement)
        ahead = [hop.occupied + hop.latency for hop in forward]
        back = [hop.occupied + hop.latency for hop in backward]
        self.forward, self.input_grad = times[Kind.F], times[Kind.I]
        # Inside of a full backward the weight gradient is not dispatched by itself.
        self.weight_grad = [whole - half for whole, half in zip(times[Kind.B], times[Kind.I], strict=True)]
        self.steps = [sum(times[Kind.STEP][stage] for stage in own) for own in problem.stages_of]
        links = zip(self.forward, ahead, strict=False)
        self.heads = list(accumulate((time + hop for time, hop in links), initial=0.0))
        turns = [ahead[cut] + self.forward[cut + 1] + self.input_grad[cut + 1] + back[cut] for cut in range(len(ahead))]
        self.paths = list(accumulate(reversed(turns), initial=0.0))[::-1]
        self.drains = [0.0]
        for stage in range(placement.num_stages - 1):
            ending = self.weight_grad[stage] + self.steps[problem.rank_of[stage]]
            self.drains.append(back[stage] + self.input_grad[stage] + max(ending, self.drains[stage]))


def _rank_bounds(problem: SearchProblem, times: _StageTimes, rank: int) -> list[float]:
    own, room, count = problem.stages_of[rank], problem.capacity[rank], problem.num_microbatches
    lowest, highest = own[0], own[-1]
    head, drain, steps = times.heads[lowest], times.drains[lowest], times.steps[rank]
    forward, input_grad, weight_grad = (
        [each[stage] for stage in own] for each in (times.forward, times.input_grad, times.weight_grad)
    )
    waiting = count * (sum(forward) + sum(input_grad))
    work = waiting + count * sum(weight_grad)
    places = min(room, len(own) * count)
    first_gradient = times.heads[highest] + times.forward[highest] + times.paths[highest]
    filling = max(0.0, first_gradient - head - places * max(forward))
    draining = max(steps, drain - places * max(weight_grad))
    forced = max(0, len(own) * count - room) * min(weight_grad)
    residencies = [
        times.forward[stage] + times.paths[stage] + times.input_grad[stage] + times.weight_grad[stage] for stage in own
    ]
    bounds = [
        head + work + filling + draining,
        head + waiting + forced + drain,
        head + count * sum(residencies) / room + steps,
    ]
    for stage, residency in zip(own, residencies, strict=True):
        queue, left = divmod(count - 1, room)
        slower = left * max(times.forward[stage], times.input_grad[stage])
        end = max(residency + steps, residency - times.weight_grad[stage] + times.drains[stage])
        bounds.append(times.heads[stage] + queue * residency + slower + end)
        if len(own) == 2 and stage == lowest:
            queue, left = divmod(count - 1, room - 1)
            there = times.heads[highest] + times.forward[highest] - head
            stay = there + times.paths[highest] + times.input_grad[highest] + times.weight_grad[highest]
            bounds.append(head + queue * min(residency, stay) + left * times.forward[stage] + end)
    return bounds
