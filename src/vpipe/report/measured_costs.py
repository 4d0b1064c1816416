"""What a run's actions cost, from its trace: each stage's work, and what the executor and the links add to it.

Times are in ms. Means are of all values: what a machine's hiccups cost, a prediction has to count as well.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from operator import attrgetter

from vpipe.report.link_fit import Delivery, expected_arrivals, fit_link
from vpipe.runtime.trace import TraceEvent
from vpipe.schedule.action import COMPUTE, MOVES, Action, Kind
from vpipe.schedule.passes.lower import counterpart
from vpipe.schedule.simulate.costs import Link

__all__ = ["MeasuredCosts", "Overheads", "measure_costs"]

_SENDS = (Kind.SEND_F, Kind.SEND_B)
_RECEIVES = (Kind.RECV_F, Kind.RECV_B)
_WAITED = 2.0
"""What takes so many times as long as it would by itself has waited for something."""
_NOISE_MS = 0.2


@dataclass(frozen=True)
class Overheads:
    """What the executor adds to the work of the stages, in ms."""

    gap_ms: float = 0.0
    """Between two actions."""
    send_ms: float = 0.0
    """To hand over a message; the rank is busy with it."""
    receive_ms: float = 0.0
    """To take a message that is there already."""
    turn_ms: float = 0.0
    """Synchronous: between two batches, on a rank that waits for nobody. Asynchronous: after each update."""
    tell_ms: float | None = None
    """From a batch's end on the last stage's rank until the others, who want its loss, can begin the next one; None:
    nobody was seen waiting for that."""
    meet_ms: float | None = None
    """What an update takes in which all ranks wait for each other, as for the gradient norm; None: they do not."""


@dataclass(frozen=True)
class MeasuredCosts:
    """What a run's actions took."""

    work_ms: Mapping[tuple[int, Kind], float]
    """Of one computation, by stage and kind; of a move to host memory or back, how long its rank is busy with it."""
    overheads: Overheads
    links: Mapping[tuple[int, int], Link]
    """By sending and receiving rank: from the end of a send until the rank that waits for the message has it, less
    what taking it costs; bandwidth in bytes per ms, infinite where no message waited for another."""


def measure_costs(events: Iterable[TraceEvent], message_bytes: Mapping[Action, float] | None = None) -> MeasuredCosts:
    """Return the costs that the trace of all ranks shows.

    Args:
        events: of whole iterations, on all ranks; with several iterations, what is between them is known too.
        message_bytes: bytes of each send, with microbatch 0; without them all messages count one byte.
    """
    rows = _rows(events)
    work: dict[tuple[int, Kind], list[float]] = defaultdict(list)
    for event in (event for row in rows for event in row):
        if event.action.kind in COMPUTE or event.action.kind in MOVES:
            work[event.action.stage, event.action.kind].append(event.work_ns / 1e6)
    sends = [event.duration_ns / 1e6 for row in rows for event in row if event.action.kind in _SENDS]
    receive_ms, links = _message_costs(_pairs(rows), _mean(sends), message_bytes or {})
    whole = [_without_holes(row) for row in rows]
    gaps = [gap for row in whole for gap in _gaps(row)]
    overheads = Overheads(
        gap_ms=_mean(gaps),
        send_ms=_mean(sends),
        receive_ms=receive_ms,
        turn_ms=_turn_ms(whole),
        tell_ms=_tell_ms(rows, _turn_ms(rows)),
        meet_ms=_meet_ms(rows),
    )
    return MeasuredCosts({key: _mean(times) for key, times in work.items()}, overheads, links)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def _rows(events: Iterable[TraceEvent]) -> list[list[TraceEvent]]:
    """Return each rank's events in order; an action that a timeline split into waiting and work is one again."""
    rows: defaultdict[int, list[TraceEvent]] = defaultdict(list)
    for event in sorted(events, key=attrgetter("rank", "start_ns")):
        row = rows[event.rank]
        if row and (row[-1].action, row[-1].iteration) == (event.action, event.iteration):
            row[-1] = replace(row[-1], end_ns=event.end_ns, wait_ns=row[-1].wait_ns + event.wait_ns)
        else:
            row.append(event)
    return [rows[rank] for rank in sorted(rows)]


def _without_holes(row: list[TraceEvent]) -> list[TraceEvent]:
    """Return the part of a rank's events in which none is missing.

    In an asynchronous run, forwards of one iteration lie between backwards of those before it, which a timeline may
    have left out: all are there from the first backward of the first iteration to the last forward of the last.
    """
    if _is_synchronous([row]):
        return row
    kinds = [event.action.kind for event in row]
    if Kind.B not in kinds or Kind.F not in kinds:
        return []
    return row[kinds.index(Kind.B) : len(kinds) - kinds[::-1].index(Kind.F)]


def _gaps(row: Sequence[TraceEvent]) -> Iterator[float]:
    for before, after in pairwise(row):
        if before.iteration == after.iteration and before.action.kind is not Kind.STEP:
            yield max(0, after.start_ns - before.end_ns) / 1e6


@dataclass(frozen=True)
class _Pair:
    """A message's send and receive, on two ranks."""

    send: TraceEvent
    receive: TraceEvent

    @property
    def was_awaited(self) -> bool:
        return self.receive.start_ns < self.send.start_ns

    @property
    def taken_ms(self) -> float:
        return self.receive.duration_ns / 1e6

    @property
    def way_ms(self) -> float:
        # A sender that loses its core right after a send has been outrun by its own message.
        return max(0, self.receive.end_ns - self.send.end_ns) / 1e6


def _pairs(rows: Sequence[Sequence[TraceEvent]]) -> list[_Pair]:
    """Return all messages whose both ends were recorded, in the order of their sends."""
    received = {
        (event.iteration, event.action): event for row in rows for event in row if event.action.kind in _RECEIVES
    }
    sends = [event for row in rows for event in row if event.action.kind in _SENDS]
    pairs = ((send, received.get((send.iteration, counterpart(send.action)))) for send in sends)
    found = [_Pair(send, receive) for send, receive in pairs if receive is not None]
    return sorted(found, key=lambda pair: pair.send.end_ns)


def _message_costs(
    pairs: Sequence[_Pair], send_ms: float, message_bytes: Mapping[Action, float]
) -> tuple[float, dict[tuple[int, int], Link]]:
    """Return what taking a message costs that is there, and the links.

    Who waits for a message shows when it arrived and was taken, both at once. The links that explain these times tell
    which of the other messages were there before they were asked for.
    """
    by_link: defaultdict[tuple[int, int], list[_Pair]] = defaultdict(list)
    for pair in pairs:
        by_link[pair.send.rank, pair.receive.rank].append(pair)
    taken, fitted = [], {}
    for key, own in sorted(by_link.items()):
        deliveries = [_delivery(pair, send_ms, message_bytes) for pair in own]
        fitted[key] = link = fit_link(deliveries)
        arrivals = [0.0] * len(own) if link is None else expected_arrivals(deliveries, link)
        asked = zip(own, arrivals, strict=True)
        taken += [pair.taken_ms for pair, arrival in asked if pair.receive.start_ns / 1e6 > arrival]
    usual = _mean([link.latency for link in fitted.values() if link is not None])
    receive_ms = min(_mean(taken), usual)
    whole = {key: link or Link(usual) for key, link in fitted.items()}
    return receive_ms, {key: replace(link, latency=max(0.0, link.latency - receive_ms)) for key, link in whole.items()}


def _delivery(pair: _Pair, send_ms: float, message_bytes: Mapping[Action, float]) -> Delivery:
    # To take a message costs about as much as to send one; what takes much longer has waited.
    waited = pair.was_awaited or pair.taken_ms > _WAITED * send_ms + _NOISE_MS
    sent = pair.send.end_ns / 1e6
    num_bytes = message_bytes.get(replace(pair.send.action, microbatch=0), 1.0)
    return Delivery(sent, sent + pair.way_ms if waited else None, num_bytes)


def _last_steps(row: Sequence[TraceEvent]) -> dict[int, TraceEvent]:
    """Return the last update of each iteration."""
    return {event.iteration: event for event in row if event.action.kind is Kind.STEP}


def _is_synchronous(rows: Sequence[Sequence[TraceEvent]]) -> bool:
    """Tell whether ranks end an iteration before they begin the next."""
    orders = ([iteration for iteration, _ in groupby(row, key=attrgetter("iteration"))] for row in rows)
    return all(len(order) == len(set(order)) for order in orders)


def _turns(rows: Sequence[Sequence[TraceEvent]]) -> Iterator[tuple[int, int, float, float]]:
    """Yield a rank's index, an iteration, the rank's end of it and its start of the next."""
    for index, row in enumerate(rows):
        for before, after in pairwise(row):
            if after.iteration == before.iteration + 1:
                yield index, before.iteration, before.end_ns / 1e6, after.start_ns / 1e6


def _teller(rows: Sequence[Sequence[TraceEvent]]) -> int:
    """Return the index of the rank with the last stage, which is the one that knows the loss."""
    return max(range(len(rows)), key=lambda index: max(event.action.stage for event in rows[index]))


def _turn_ms(rows: Sequence[Sequence[TraceEvent]]) -> float:
    if not _is_synchronous(rows):
        steps = ((before, after) for row in rows for before, after in pairwise(row) if before.action.kind is Kind.STEP)
        return _mean([max(0, after.start_ns - before.end_ns) / 1e6 for before, after in steps])
    # A rank that waits for the loss shows how long that takes, not how long its own turn does.
    turns: defaultdict[int, list[float]] = defaultdict(list)
    for index, _, end, start in _turns(rows):
        turns[index].append(start - end)
    return min((statistics.median(times) for times in turns.values()), default=0.0)


def _tell_ms(rows: Sequence[Sequence[TraceEvent]], turn_ms: float) -> float | None:
    if not rows or not _is_synchronous(rows):
        return None
    teller = _teller(rows)
    told = {iteration: step.end_ns / 1e6 for iteration, step in _last_steps(rows[teller]).items()}
    waits = []
    for index, iteration, end, start in _turns(rows):
        # Who ended before the last stage's rank, and took far longer than a turn to go on, waited for it.
        if index != teller and end < told[iteration] < start and start - end > _WAITED * turn_ms:
            waits.append(start - told[iteration])
    return _mean(waits) if waits else None


def _meet_ms(rows: Sequence[Sequence[TraceEvent]]) -> float | None:
    """Return the time of an update on the rank that comes last, of which the others' waiting is no part."""
    steps = [_last_steps(row) for row in rows]
    if not rows or not _is_synchronous(rows) or not any(step.wait_ns for row in steps for step in row.values()):
        return None
    shared = set.intersection(*(set(row) for row in steps))
    least = [min(row[iteration].wait_ns for row in steps) / 1e6 for iteration in shared]
    return _mean(least) if least else None
