"""What a rank holds on its device, over time: activations, and weight versions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Kind
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.simulate.simulate import Event, Simulation
from vpipe.schedule.weights import weight_usage

__all__ = ["Curve", "activations_over_time", "weight_versions_over_time"]

Curve = tuple[tuple[float, float], ...]
"""(time, what is held from then on) at every change, in order of time; the first is what is held at the start."""


def activations_over_time(simulation: Simulation, stage_bytes: Sequence[float] | None = None) -> tuple[Curve, ...]:
    """Return what each rank holds of its microbatches in flight.

    A microbatch is held from the start of its forward to the end of its backward, or of its weight gradient when the
    backward is split, but for the time from the end of its OFFLOAD to the start of its FETCH. `stage_bytes` is what one
    microbatch takes on each stage; without it the unit is a microbatch of the whole rank (on a rank of v stages, one
    stage counts 1/v).

    Raises:
        ScheduleError: not one number per stage.
    """
    sizes = _sizes(simulation.schedule, stage_bytes)
    both = zip(simulation.events, simulation.moves, strict=True)
    return tuple(_curve(0.0, _activation_changes([*events, *moves], sizes)) for events, moves in both)


def weight_versions_over_time(simulation: Simulation, stage_bytes: Sequence[float] | None = None) -> tuple[Curve, ...]:
    """Return the weight versions that each rank keeps: the newest one, and those that microbatches still need.

    What is moved to host memory does not count from the update that replaces it to the start of its FETCH_V.
    `stage_bytes` is what the parameters of each stage take; without it the unit is the parameters of the whole rank. A
    version that nobody needs any more is overwritten by the update that replaces it.

    Raises:
        ScheduleError: not one number per stage, or a forward that comes before the version it needs.
    """
    schedule = simulation.schedule
    sizes, usage = _sizes(schedule, stage_bytes), weight_usage(schedule)
    curves = []
    for rank, events in enumerate(simulation.events):
        stages = schedule.placement.stages_of(rank)
        changes = [
            change
            for stage in stages
            for change in _version_changes(
                [*events, *simulation.moves[rank]], stage, usage[stage].version_of, sizes[stage]
            )
        ]
        curves.append(_curve(sum(sizes[stage] for stage in stages), changes))
    return tuple(curves)


def _sizes(schedule: Schedule, stage_bytes: Sequence[float] | None) -> Sequence[float]:
    if stage_bytes is None:
        return (1 / schedule.placement.stages_per_rank,) * schedule.num_stages
    if len(stage_bytes) != schedule.num_stages:
        raise ScheduleError(
            f"stage_bytes has {len(stage_bytes)} entries for {schedule.num_stages} stages; give one per stage"
        )
    return stage_bytes


def _activation_changes(events: Iterable[Event], sizes: Sequence[float]) -> Iterable[tuple[float, float]]:
    for action, start, end in events:
        if action.kind is Kind.F:
            yield start, sizes[action.stage]
        elif action.kind in (Kind.B, Kind.W, Kind.OFFLOAD):
            yield end, -sizes[action.stage]
        elif action.kind is Kind.FETCH:
            yield start, sizes[action.stage]


def _version_changes(
    events: Iterable[Event], stage: int, version_of: Sequence[int], size: float
) -> Iterable[tuple[float, float]]:
    made: list[float] = []  # when version 1, 2, ... was made
    last_use: dict[int, float] = {}
    back: dict[int, float] = {}
    for action, start, end in events:
        if action.stage != stage:
            continue
        if action.kind is Kind.STEP:
            made.append(end)
        elif action.kind in (Kind.B, Kind.W):
            version = version_of[action.microbatch]
            last_use[version] = max(last_use.get(version, 0.0), end)
        elif action.kind is Kind.FETCH_V:
            back[version_of[action.microbatch]] = start
    for version, replaced in enumerate(made):
        yield replaced, size
        yield max(replaced, last_use.get(version, 0.0)), -size
        if version in back:
            yield replaced, -size
            yield back[version], size


def _curve(initial: float, changes: Iterable[tuple[float, float]]) -> Curve:
    """Sum up changes; those of the same moment are one."""
    held, points = initial, [(0.0, initial)]
    for time, group in groupby(sorted(changes, key=itemgetter(0)), key=itemgetter(0)):
        held += sum(change for _, change in group)
        if time == points[-1][0]:
            points.pop()
        if not points or abs(held - points[-1][1]) > 1e-9:
            points.append((time, held))
    return tuple(points)
