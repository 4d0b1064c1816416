"""A simulation as a timeline for Perfetto (ui.perfetto.dev) or chrome://tracing.

The format is Chrome's Trace Event Format: a process per schedule, a row per rank, the messages of each link that take
time, and what each rank holds as a counter. One unit of the costs is shown as one millisecond.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vpipe.schedule.action import Kind
from vpipe.schedule.simulate.simulate import Event, Simulation
from vpipe.schedule.simulate.transfers import transfers_of
from vpipe.schedule.simulate.usage import activations_over_time

__all__ = ["to_chrome_trace"]

_MICROSECONDS = 1000.0  # per unit of the costs
_NAMES = {
    Kind.F: "forward",
    Kind.R: "recompute",
    Kind.B: "backward",
    Kind.I: "input gradient",
    Kind.W: "weight gradient",
    Kind.STEP: "update",
    Kind.OFFLOAD: "out to host memory",
    Kind.FETCH: "back from host memory",
    Kind.OFFLOAD_V: "weights out to host memory",
    Kind.FETCH_V: "weights back from host memory",
}
# Names of chrome://tracing's own palette, the ones that the timeline of a measured run has.
_COLOURS = {
    Kind.F: "rail_response",
    Kind.R: "rail_load",
    Kind.B: "good",
    Kind.I: "good",
    Kind.W: "rail_animation",
    Kind.STEP: "bad",
    Kind.OFFLOAD: "thread_state_iowait",
    Kind.FETCH: "thread_state_runnable",
    Kind.OFFLOAD_V: "terrible",
    Kind.FETCH_V: "olive",
}


def to_chrome_trace(simulations: Sequence[Simulation]) -> dict[str, Any]:
    """Return the trace as an object ready for JSON, one process for each of `simulations`."""
    rows: list[dict[str, Any]] = []
    for process, simulation in enumerate(simulations):
        rows.append(_metadata("process_name", process, 0, simulation.schedule.name))
        for rank, events in enumerate(simulation.events):
            rows.append(_metadata("thread_name", process, rank, f"rank {rank}"))
            rows.extend(_slice(process, rank, event) for event in events)
            if simulation.moves[rank]:
                row = simulation.schedule.num_ranks + rank
                rows.append(_metadata("thread_name", process, row, f"host memory of rank {rank}"))
                rows.extend(_slice(process, row, event) for event in simulation.moves[rank])
        rows.extend(_messages(process, simulation))
        rows.extend(_counters(process, simulation))
    return {"traceEvents": rows, "displayTimeUnit": "ms"}


def _metadata(name: str, process: int, thread: int, value: str) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": process, "tid": thread, "args": {"name": value}}


def _slice(process: int, rank: int, event: Event) -> dict[str, Any]:
    action, start, end = event
    return {
        "name": "STEP" if action.kind is Kind.STEP else f"{action.kind}{action.microbatch}",
        "cat": _NAMES[action.kind],
        "cname": _COLOURS[action.kind],
        "ph": "X",
        "pid": process,
        "tid": rank,
        "ts": start * _MICROSECONDS,
        "dur": (end - start) * _MICROSECONDS,
        "args": {"action": str(action), "stage": action.stage, "microbatch": action.microbatch},
    }


def _messages(process: int, simulation: Simulation) -> Iterator[dict[str, Any]]:
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


def _counters(process: int, simulation: Simulation) -> Iterator[dict[str, Any]]:
    for rank, curve in enumerate(activations_over_time(simulation)):
        for time, held in curve:
            yield {
                "name": f"microbatches held by rank {rank}",
                "ph": "C",
                "pid": process,
                "ts": time * _MICROSECONDS,
                "args": {"held": held},
            }
