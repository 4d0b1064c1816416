"""Actions as a timeline for Perfetto (ui.perfetto.dev) or chrome://tracing.

The format is Chrome's Trace Event Format, in microseconds: complete events, one row per rank. Of a simulation also the
messages of each link that take time, and what each rank holds as a counter; one unit of the costs is one millisecond.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vpipe.draw.palette import NAMES, TRACE_COLOURS
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.simulate.simulate import Event, Simulation
from vpipe.schedule.simulate.transfers import transfers_of
from vpipe.schedule.simulate.usage import activations_over_time

__all__ = ["name_row", "slice_of", "to_chrome_trace"]

Row = dict[str, Any]
_MICROSECONDS = 1000.0  # per unit of the costs
_OTHER_COLOUR = "generic_work"


def to_chrome_trace(simulations: Sequence[Simulation]) -> Row:
    """Return the trace as an object ready for JSON, one process for each of `simulations`."""
    rows: list[Row] = []
    for process, simulation in enumerate(simulations):
        rows.append(_metadata("process_name", process, 0, {"name": simulation.schedule.name}))
        for rank, events in enumerate(simulation.events):
            rows.extend(name_row(process, rank, f"rank {rank}"))
            rows.extend(_slice(process, rank, event) for event in events)
            if simulation.moves[rank]:
                row = simulation.schedule.num_ranks + rank
                rows.extend(name_row(process, row, f"host memory of rank {rank}"))
                rows.extend(_slice(process, row, event) for event in simulation.moves[rank])
        rows.extend(_messages(process, simulation))
        rows.extend(_counters(process, simulation))
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def name_row(process: int, rank: int, name: str) -> Iterator[Row]:
    """Yield what names a row and keeps it in its place."""
    yield _metadata("thread_name", process, rank, {"name": name})
    yield _metadata("thread_sort_index", process, rank, {"sort_index": rank})


def slice_of(
    action: Action,
    start_us: float,
    duration_us: float,
    rank: int,
    process: int = 0,
    more: Mapping[str, float] | None = None,
) -> Row:
    """Return an action as a complete event; `more` of it goes to its details.

    Names, categories and colours of computations and moves are those of `palette`, measured or simulated.
    """
    return {
        "name": "STEP" if action.kind is Kind.STEP else f"{action.kind}{action.microbatch}",
        "cat": NAMES.get(action.kind, "communication"),
        "cname": TRACE_COLOURS.get(action.kind, _OTHER_COLOUR),
        "ph": "X",
        "pid": process,
        "tid": rank,
        "ts": start_us,
        "dur": duration_us,
        "args": {"action": str(action), "stage": action.stage, "microbatch": action.microbatch, **(more or {})},
    }


def _metadata(name: str, process: int, thread: int, arguments: dict[str, object]) -> Row:
    return {"name": name, "ph": "M", "pid": process, "tid": thread, "args": arguments}


def _slice(process: int, rank: int, event: Event) -> Row:
    action, start, end = event
    return slice_of(action, start * _MICROSECONDS, (end - start) * _MICROSECONDS, rank, process)


def _messages(process: int, simulation: Simulation) -> Iterator[Row]:
    """Yield the messages that take time, from when they enter their link until they arrive.

    They are asynchronous events: with latency several may be under way on one link, which a row could not show.
    """
    number = 0
    for sender in range(simulation.schedule.num_ranks):
        for transfer in transfers_of(simulation, sender):
            if transfer.arrival == transfer.start:
                continue
            shared = {
                "name": f"rank {sender} to {transfer.receiver}",
                "cat": "communication",
                "pid": process,
                "id": number,
                "args": {"action": str(transfer.action)},
            }
            yield {**shared, "ph": "b", "ts": transfer.start * _MICROSECONDS}
            yield {**shared, "ph": "e", "ts": transfer.arrival * _MICROSECONDS}
            number += 1


def _counters(process: int, simulation: Simulation) -> Iterator[Row]:
    for rank, curve in enumerate(activations_over_time(simulation)):
        for time, held in curve:
            yield {
                "name": f"microbatches held by rank {rank}",
                "ph": "C",
                "pid": process,
                "ts": time * _MICROSECONDS,
                "args": {"held": held},
            }
