"""What a schedule should take on real ranks, by the simulator, from measured costs.

The simulator knows computations and links. What an executor does besides is put where it happens: sending and taking a
message belong to the computation that makes or needs it, and a message is under way for what is left until it arrives.
A synchronous training is a chain of batches, each rank beginning the next one when it may; an asynchronous one is a
single long schedule, of which the middle counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vpipe.errors import ScheduleError
from vpipe.plan.recipe import Recipe
from vpipe.report.measured_costs import MeasuredCosts, Overheads
from vpipe.schedule.action import MOVES, Action, Kind
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import Simulation, simulate

__all__ = ["StepPrediction", "build_costs", "predict_step"]

_CHAINED = 12
"""Batches that are simulated; the later half of them is looked at."""


@dataclass(frozen=True)
class StepPrediction:
    """What one batch takes in the steady state, in ms."""

    step_ms: float
    bubble_fraction: float
    """Time in which ranks do not compute, of all ranks' time; what the executor adds does not count as computing."""
    simulation: Simulation
    """Of one batch by itself; of an asynchronous schedule, of `num_batches` from an empty pipeline to an empty one."""
    num_batches: int


def build_costs(schedule: Schedule, measured: MeasuredCosts, message_bytes: Sequence[float]) -> Costs:
    """Turn measured costs into the simulator's, for a schedule that was run.

    `message_bytes` are what each stage but the last sends on. Where a backward is only known whole, all of it counts as
    its half for inputs: right for schedules that do not split it. It has its recomputation inside, unless that is an
    action of its own. Of a move there is what its rank is busy with it: the copy itself goes on beside computations,
    and where one waited for it, that is in its measured time.

    Raises:
        ScheduleError: the work of a stage is not known.
    """
    placement, synchronous = schedule.placement, schedule.synchronous
    extra, stages = measured.overheads, range(placement.num_stages)
    ranks = [placement.rank_of(stage) for stage in stages]
    crosses = [ranks[stage] != ranks[stage + 1] for stage in stages[:-1]]
    take, give = extra.receive_ms + extra.gap_ms, extra.send_ms + extra.gap_ms
    before = [False, *crosses]
    after = [*crosses, False]
    works = [_work(measured, stage) for stage in stages]
    turn = 0.0 if synchronous else extra.turn_ms
    return Costs(
        forward=tuple(work[Kind.F] + take * before[s] + give * after[s] for s, work in enumerate(works)),
        input_grad=tuple(work[Kind.I] + take * after[s] + give * before[s] for s, work in enumerate(works)),
        weight_grad=tuple(work[Kind.W] for work in works),
        step=tuple(work[Kind.STEP] + turn for work in works),
        recompute=tuple(work.get(Kind.R, 0.0) for work in works),
        handling={kind: tuple(work.get(kind, 0.0) + extra.gap_ms for work in works) for kind in MOVES},
        message_bytes=tuple(message_bytes),
        dispatch=extra.gap_ms,
        links=measured.links,
    )


def _work(measured: MeasuredCosts, stage: int) -> dict[Kind, float]:
    known = {kind: time for (index, kind), time in measured.work_ms.items() if index == stage}
    if Kind.F not in known or not ({Kind.B} <= known.keys() or {Kind.I, Kind.W} <= known.keys()):
        there = ", ".join(sorted(known)) or "nothing"
        raise ScheduleError(f"of stage {stage}, {there} was measured; its forwards and all of its backwards are needed")
    halves = {} if Kind.I in known else {Kind.I: known[Kind.B], Kind.W: 0.0}
    return {Kind.STEP: 0.0, **known, **halves}


def predict_step(recipe: Recipe, measured: MeasuredCosts, message_bytes: Sequence[float]) -> StepPrediction:
    """Predict the time of one batch.

    Args:
        recipe: what was run.
        measured: costs, by stage and by rank.
        message_bytes: what each stage but the last sends to the next for one microbatch.

    Raises:
        ScheduleError: the schedule cannot be built, or the costs do not fit it.
    """
    _, num_microbatches = recipe.sizes
    one = recipe.build()
    if one.synchronous:
        costs = build_costs(one, measured, message_bytes)
        simulation, num_batches = simulate(one, costs), 1
        step_ms = _chain_batches(one, costs, measured.overheads)
    else:
        num_batches = _CHAINED + -(-4 * one.num_stages // num_microbatches)
        schedule = recipe.build(num_batches)
        simulation = simulate(schedule, build_costs(schedule, measured, message_bytes))
        step_ms = _steady_period(simulation, num_microbatches, num_batches)
    return StepPrediction(step_ms, _bubble(one, measured, step_ms), simulation, num_batches)


def _bubble(one: Schedule, measured: MeasuredCosts, step_ms: float) -> float:
    work = [_work(measured, stage) for stage in range(one.num_stages)]
    whole = [times | {Kind.B: times[Kind.I] + times[Kind.W]} for times in work]
    actions = [action for order in one.orders for action in order if action.kind not in MOVES]
    busy = sum(whole[action.stage].get(action.kind, 0.0) for action in actions)
    return 1 - busy / (one.num_ranks * step_ms) if step_ms else 0.0


def _chain_batches(schedule: Schedule, costs: Costs, extra: Overheads) -> float:
    """Simulate batch after batch and return their mean distance once the start is forgotten."""
    teller = schedule.rank_of(Action(schedule.num_stages - 1, Kind.F, 0))
    starts = [0.0] * schedule.num_ranks
    marks = []
    for _ in range(_CHAINED):
        ends = _meet(simulate(schedule, costs, starts), extra)
        marks.append(ends[0])
        begin = [end + extra.turn_ms for end in ends]
        if extra.tell_ms is not None:
            known = ends[teller] + extra.tell_ms
            begin = [time if rank == teller else max(time, known) for rank, time in enumerate(begin)]
        starts = begin
    return statistics.fmean(later - earlier for earlier, later in pairwise(marks[_CHAINED // 2 :]))


def _meet(simulation: Simulation, extra: Overheads) -> list[float]:
    """Return when each rank ends a batch: where the update is a meeting of all, none ends before the last comes."""
    ends = [events[-1].end for events in simulation.events]
    if extra.meet_ms is None:
        return ends
    met = max(events[-1].start for events in simulation.events) + extra.meet_ms
    return [max(end, met + end - events[-1].start) for end, events in zip(ends, simulation.events, strict=True)]


def _steady_period(simulation: Simulation, num_microbatches: int, num_batches: int) -> float:
    """Return the mean time between batches on rank 0, away from the filling and draining ends."""
    ends: dict[int, float] = {}
    for action, _, end in simulation.events[0]:
        if action.kind in (Kind.STEP, Kind.B, Kind.W):
            ends[action.microbatch // num_microbatches] = end
    first, last = num_batches // 2, num_batches - 1 - (num_batches - _CHAINED) // 2
    return (ends[last] - ends[first]) / (last - first)
