"""How a schedule looks: a grid of ranks and time, a summary in words, and plain data for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from vpipe.draw.palette import MARKS
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.schedule import Schedule, WeightRule
from vpipe.schedule.simulate.idle import CAUSES, idle_times
from vpipe.schedule.simulate.simulate import Event, Simulation
from vpipe.schedule.traffic import traffic
from vpipe.schedule.weights import StageWeights, weight_usage

__all__ = ["Grid", "Segment", "columns_per_time", "legend", "summary_lines", "text_grid", "to_dict"]

Segment = tuple[str, Kind | None]
"""A piece of a line and the kind of action it draws, for colour."""

_TICK_COLUMNS = 8
_LEGEND = {
    Kind.F: "F forward",
    Kind.R: "R recompute",
    Kind.B: "B backward",
    Kind.I: "I input gradient",
    Kind.W: "W weight gradient",
    Kind.STEP: "* or U update",
    Kind.OFFLOAD: "> out to host memory",
    Kind.FETCH: "< back",
    Kind.OFFLOAD_V: "} weight version out to host memory",
    Kind.FETCH_V: "{ back",
}
_WEIGHTS = {
    WeightRule.NEWEST: "A forward uses the newest weights of its stage, its backward the same ones (weight stashing).",
    WeightRule.VERTICAL: "A microbatch uses the version number it had at stage 0 on every stage (vertical sync).",
    WeightRule.DELAYED: "Gradients of several microbatches make one update, from the weights one update back (2BW).",
}


@dataclass(frozen=True)
class Grid:
    """Rows of equal width: a time axis, then one row per rank; `kinds` says what each character draws."""

    names: tuple[str, ...]
    rows: tuple[str, ...]
    kinds: tuple[tuple[Kind | None, ...], ...]

    def lines(self, max_columns: int | None = None) -> list[list[Segment]]:
        """Return the lines as coloured pieces, folded into bands of `max_columns` with an empty line between."""
        margin = max(map(len, self.names)) + 1
        width = max(map(len, self.rows))
        band = width if max_columns is None else max(max_columns - margin, 20)
        lines: list[list[Segment]] = []
        for start in range(0, width, max(band, 1)):
            if start:
                lines.append([])
            for name, row, kinds in zip(self.names, self.rows, self.kinds, strict=True):
                cut = slice(start, start + band)
                lines.append([(name.ljust(margin), None), *_segments(row[cut], kinds[cut])])
        return lines

    def text(self, max_columns: int | None = None) -> str:
        """Return the lines without colour."""
        return "\n".join("".join(text for text, _ in line).rstrip() for line in self.lines(max_columns))


def text_grid(simulation: Simulation, scale: float | None = None) -> Grid:
    """Draw `simulation`: time on columns, ranks on rows; blank is idle.

    A cell like ``B0---`` is as wide as its action is long; with several stages per rank it starts with the stage,
    ``2B0``. An update that takes no time is a ``*`` where it happens. Widths are exact when all times are multiples of
    a common unit that is not too fine, rounded otherwise. `scale` is in columns per unit of time; None: what fits.
    Under a rank that moves activations or weight versions stands its link to host memory.
    """
    with_stage = simulation.schedule.placement.stages_per_rank > 1
    scale = columns_per_time(simulation) if scale is None else scale
    start = min(events[0].start for events in simulation.events if events)
    width = max(1, round(simulation.makespan * scale))
    names, rows = ["time"], [_axis(scale, width)]
    kinds: list[tuple[Kind | None, ...]] = [(None,) * width]
    for rank, events in enumerate(simulation.events):
        row, row_kinds = _draw(events, start, scale, width, with_stage)
        names.append(f"rank {rank}")
        rows.append(row)
        kinds.append(row_kinds)
        if simulation.moves[rank]:
            row, row_kinds = _draw(simulation.moves[rank], start, scale, width, with_stage)
            names.append("  host")
            rows.append(row)
            kinds.append(row_kinds)
    return Grid(tuple(names), tuple(rows), tuple(kinds))


def legend(*schedules: Schedule) -> str:
    """Say what the letters in the pictures of `schedules` mean."""
    kinds = {action.kind for schedule in schedules for order in schedule.orders for action in order}
    return "  ".join([text for kind, text in _LEGEND.items() if kind in kinds] + ["(blank: idle)"])


def to_dict(simulation: Simulation) -> dict[str, object]:
    """Return the schedule and what is computed from it, ready for JSON.

    Per rank: `peak_activations` in microbatches and `weight_versions` in parameter sets, both in whole-rank units (on
    a rank of v stages, one stage counts 1/v), and, where some are moved, how many of the latter are on the device;
    `staleness` is the largest of the rank's stages and microbatches; `idle` is its idle time by cause; `actions` are
    its computations in text form. `traffic` is the messages between ranks, relative to one stage per rank.
    """
    schedule = simulation.schedule
    usage, idle = weight_usage(schedule), idle_times(simulation)
    versions, on_device = [stage.num_versions for stage in usage], [stage.num_on_device for stage in usage]
    return {
        "schedule": schedule.name,
        "num_ranks": schedule.num_ranks,
        "num_stages": schedule.num_stages,
        "num_microbatches": schedule.num_microbatches,
        "makespan": _number(simulation.makespan),
        "bubble_fraction": simulation.bubble_fraction,
        "span_bubble_fraction": simulation.span_bubble_fraction,
        "peak_activations": [_number(peak) for peak in peak_activations(schedule)],
        "weight_versions": _versions(schedule, versions),
        **({"weight_versions_on_device": _versions(schedule, on_device)} if on_device != versions else {}),
        "staleness": _staleness(schedule, usage),
        "traffic": _number(traffic(schedule.placement)),
        "idle": {cause: [rank[cause] for rank in idle] for cause in CAUSES},
        "actions": [[str(action) for action in order] for order in schedule.orders],
    }


def summary_lines(simulation: Simulation, sentence: str) -> list[str]:
    """Say in words what `simulation` shows; `sentence` is what the schedule does."""
    schedule = simulation.schedule
    usage = weight_usage(schedule)
    versions, on_device = [stage.num_versions for stage in usage], [stage.num_on_device for stage in usage]
    device = f", {_listed(_versions(schedule, on_device))} on the device" if on_device != versions else ""
    last = schedule.num_ranks - 1
    ranks = "of the rank" if last == 0 else f"on ranks 0 to {last}"
    bubble, span = 100 * simulation.bubble_fraction, 100 * simulation.span_bubble_fraction
    return [
        f"{schedule.name}: {sentence}",
        *([] if schedule.synchronous else [_WEIGHTS[schedule.weight_rule]]),
        f"makespan          {simulation.makespan:g}",
        f"bubble            {bubble:.2f} % of all ranks' time is idle; {span:.2f} % between a rank's own start and end",
        f"peak activations  {_listed(peak_activations(schedule))} microbatches held {ranks}",
        f"weight versions   {_listed(_versions(schedule, versions))} parameter sets kept {ranks}{device}",
        f"staleness         {_listed(_staleness(schedule, usage))} updates {ranks}",
        f"traffic           {traffic(schedule.placement):.3g} times the messages of one stage per rank",
        f"idle              {_idle_shares(simulation)}",
    ]


def _idle_shares(simulation: Simulation) -> str:
    """List the causes of idle time, the largest first, as shares of all ranks' time."""
    total = simulation.schedule.num_ranks * simulation.makespan
    if not total:
        return "never"
    idle = idle_times(simulation)
    shares = {cause: math.fsum(rank[cause] for rank in idle) / total for cause in CAUSES}
    shown = sorted((cause for cause in CAUSES if shares[cause] > 5e-5), key=lambda cause: -shares[cause])
    return ", ".join(f"{100 * shares[cause]:.2f} % {cause}" for cause in shown) or "never"


def _versions(schedule: Schedule, counts: Sequence[int]) -> list[float]:
    """Add up counts of stages on each rank, in whole-rank units."""
    placement = schedule.placement
    sums = [sum(counts[stage] for stage in placement.stages_of(rank)) for rank in range(placement.num_ranks)]
    return [_number(versions / placement.stages_per_rank) for versions in sums]


def _staleness(schedule: Schedule, usage: Sequence[StageWeights]) -> list[int]:
    placement = schedule.placement
    return [
        max(max(usage[stage].staleness) for stage in placement.stages_of(rank)) for rank in range(placement.num_ranks)
    ]


def _number(value: float) -> float:
    """Turn whole floats into ints, so that JSON says 33 and not 33.0."""
    return int(value) if float(value).is_integer() else value


def _listed(values: Iterable[float]) -> str:
    texts = [f"{value:g}" for value in values]
    return " ".join(texts if len(texts) <= 16 else [*texts[:12], "...", texts[-1]])


def _segments(row: str, kinds: Sequence[Kind | None]) -> list[Segment]:
    groups = groupby(zip(row, kinds, strict=True), key=lambda pair: pair[1])
    return [("".join(character for character, _ in pairs), kind) for kind, pairs in groups]


def _label(action: Action, with_stage: bool) -> str:
    kind = MARKS.get(action.kind, action.kind.value)
    return f"{action.stage if with_stage else ''}{kind}{action.microbatch}"


def columns_per_time(simulation: Simulation) -> float:
    """Choose the scale: room for a label and a gap in the shortest cell that is not tiny beside the longest."""
    with_stage = simulation.schedule.placement.stages_per_rank > 1
    sizes: dict[float, int] = {}
    for events in simulation.events:
        for action, start, end in events:
            duration = round(end - start, 9)
            if duration > 0:
                sizes[duration] = max(sizes.get(duration, 0), len(_label(action, with_stage)) + 1)
    if not sizes:
        return 1.0
    longest = max(sizes)
    needed = max(size / duration for duration, size in sizes.items() if duration >= longest / 20)
    for parts in (1, 2, 3, 4, 5, 8, 10, 100):
        units = [duration * parts for duration in sizes]
        if all(math.isclose(unit, round(unit), abs_tol=1e-6) for unit in units):
            unit = math.gcd(*map(round, units)) / parts
            exact = math.ceil(needed * unit - 1e-9) / unit
            return exact if exact <= 2 * needed else needed
    return needed


def _axis(scale: float, width: int) -> str:
    """Write the time at round numbers, about every `_TICK_COLUMNS` columns."""
    least = _TICK_COLUMNS / scale
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))
    axis = [" "] * width
    for tick in range(math.ceil(width / scale / step)):
        column, text = round(tick * step * scale), f"{tick * step:g}"
        if column + len(text) <= width:
            axis[column : column + len(text)] = text
    return "".join(axis)


def _draw(
    events: Sequence[Event], origin: float, scale: float, width: int, with_stage: bool
) -> tuple[str, tuple[Kind | None, ...]]:
    row, kinds = [" "] * width, [None] * width  # type: list[str], list[Kind | None]
    for action, start, end in events:
        first, last = round((start - origin) * scale), round((end - origin) * scale)
        if last > first:
            bar = _label(action, with_stage)[: max(last - first - 1, 1)].ljust(last - first - 1, "-")
            row[first : first + len(bar)] = bar
            kinds[first : first + len(bar)] = [action.kind] * len(bar)
        elif action.kind is Kind.STEP:
            column = max(0, last - 1)
            row[column], kinds[column] = "*", Kind.STEP
    return "".join(row), tuple(kinds)
