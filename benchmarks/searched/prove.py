"""The proven optimum of one placement, by OR-tools' CP-SAT: the search's judge, which shares none of its code.

Start times are the unknowns: a rank computes one thing at a time; F, I and W of a stage come in microbatch order and
after what they need; and a microbatch takes a place of its rank's memory from the start of F to the end of W.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ortools.sat.python import cp_model

from vpipe.schedule.placement import Placement

__all__ = ["Proof", "prove"]

KINDS = ("F", "I", "W")


@dataclass(frozen=True)
class Proof:
    """What the solver found: no order is shorter than `bound`, and where `is_proven` none is shorter than `makespan`.

    A `makespan` of None: no order as short as the known one was found; if that `is_proven`, there is none.
    """

    makespan: int | None
    bound: int
    is_proven: bool
    seconds: float


def prove(
    placement: Placement,
    num_microbatches: int,
    times: Sequence[tuple[int, int, int]],
    places: Sequence[int],
    known: int,
    *,
    seconds: float,
    num_workers: int = 2,
) -> Proof:
    """Minimise the makespan.

    Args:
        placement: which rank holds which stages.
        num_microbatches: of one batch.
        times: per stage, of one forward, input gradient and weight gradient, in whole units.
        places: per rank, microbatches of one stage that it may hold.
        known: only orders at least as short as this count.
        seconds: how long the solver may take.
        num_workers: threads.
    """
    model, last = cp_model.CpModel(), placement.num_stages - 1
    starts = {
        (stage, kind, microbatch): model.new_int_var(0, known, f"{stage}{kind}{microbatch}")
        for stage in range(placement.num_stages)
        for kind in KINDS
        for microbatch in range(num_microbatches)
    }

    def end(stage: int, kind: str, microbatch: int) -> cp_model.LinearExpr:
        return starts[stage, kind, microbatch] + times[stage][KINDS.index(kind)]

    makespan = model.new_int_var(0, known, "makespan")
    for (stage, kind, microbatch), start in starts.items():
        if microbatch:
            model.add(start >= end(stage, kind, microbatch - 1))
        if kind == "F" and stage:
            model.add(start >= end(stage - 1, "F", microbatch))
        elif kind == "I":
            model.add(start >= (end(stage + 1, "I", microbatch) if stage < last else end(stage, "F", microbatch)))
        elif kind == "W":
            model.add(start >= end(stage, "I", microbatch))
            model.add(makespan >= end(stage, "W", microbatch))
    for rank in range(placement.num_ranks):
        own = placement.stages_of(rank)
        work = [
            model.new_fixed_size_interval_var(start, times[stage][KINDS.index(kind)], f"{stage}{kind}{microbatch}")
            for (stage, kind, microbatch), start in starts.items()
            if stage in own
        ]
        model.add_no_overlap(work)
        held = []
        for stage in own:
            for microbatch in range(num_microbatches):
                start, stop = starts[stage, "F", microbatch], end(stage, "W", microbatch)
                size = model.new_int_var(0, known, "")
                held.append(model.new_interval_var(start, size, stop, ""))
        model.add_cumulative(held, [1] * len(held), places[rank])
    for kind, step in (("F", 1), ("I", -1)):
        _keep_order_on_links(model, starts, placement, num_microbatches, kind, step)
    model.minimize(makespan)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = num_workers
    status = solver.solve(model)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    impossible = status == cp_model.INFEASIBLE
    return Proof(
        makespan=round(solver.objective_value) if found else None,
        bound=known + 1 if impossible else round(solver.best_objective_bound),
        is_proven=impossible or status == cp_model.OPTIMAL,
        seconds=round(solver.wall_time, 2),
    )


def _keep_order_on_links(
    model: cp_model.CpModel,
    starts: dict[tuple[int, str, int], cp_model.IntVar],
    placement: Placement,
    num_microbatches: int,
    kind: str,
    step: int,
) -> None:
    """Let a link that carries messages for several stages hand them over in the order they were sent."""
    stages = range(placement.num_stages)
    sharing: dict[tuple[int, int], list[int]] = {}
    for stage in stages:
        link = placement.rank_of(stage), placement.rank_of(stage + step) if stage + step in stages else -1
        if link[1] >= 0 and link[0] != link[1]:
            sharing.setdefault(link, []).append(stage)
    for senders in sharing.values():
        for one, other in itertools.combinations(senders, 2):
            for first, second in itertools.product(range(num_microbatches), repeat=2):
                is_first = model.new_bool_var("")
                for stage in (0, step):
                    a, b = starts[one + stage, kind, first], starts[other + stage, kind, second]
                    model.add(a < b).only_enforce_if(is_first)
                    model.add(a > b).only_enforce_if(is_first.negated())
