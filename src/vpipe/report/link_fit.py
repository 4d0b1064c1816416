"""A link's latency and bandwidth, from when messages were sent and when they arrived."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from vpipe.schedule.simulate.costs import Link

__all__ = ["Delivery", "expected_arrivals", "fit_link"]

_CANDIDATES = 200
_WORTH = 0.1
"""A bandwidth is believed when it explains this share of the usual delay; less is noise."""


class Delivery(NamedTuple):
    """One message: when it was sent, when it arrived (None: before anybody waited for it), and its size."""

    sent: float
    arrived: float | None
    num_bytes: float


def fit_link(deliveries: Sequence[Delivery]) -> Link | None:
    """Return the link that explains the arrivals best, one message at a time on it; None where no arrival was seen.

    `deliveries` are in the order of their sends, all messages of this direction. Latency and time on the link can be
    told apart only where messages queue or differ in size: elsewhere all of the delay is latency.
    """
    delays = [delivery.arrived - delivery.sent for delivery in deliveries if delivery.arrived is not None]
    if not delays:
        return None
    largest = max(delivery.num_bytes for delivery in deliveries)
    slowest = max(0.0, statistics.median(delays))  # the largest message cannot be on the link for longer
    best_error, best_latency = _explain(deliveries, 0.0)
    best_time, limit = 0.0, best_error - _WORTH * slowest
    for step in range(1, _CANDIDATES + 1):
        time = slowest * step / _CANDIDATES
        error, latency = _explain(deliveries, time / largest)
        if error < min(limit, best_error) and latency >= 0:
            best_error, best_latency, best_time = error, latency, time
    return Link(max(0.0, best_latency), largest / best_time if best_time else math.inf)


def _explain(deliveries: Sequence[Delivery], time_per_byte: float) -> tuple[float, float]:
    """Return the mean distance to the arrivals with this bandwidth and its best latency, and that latency."""
    departures = _departures(deliveries, time_per_byte)
    pairs = zip(deliveries, departures, strict=True)
    rests = [delivery.arrived - departure for delivery, departure in pairs if delivery.arrived is not None]
    latency = statistics.median(rests)
    return statistics.fmean(abs(rest - latency) for rest in rests), latency


def _departures(deliveries: Sequence[Delivery], time_per_byte: float) -> list[float]:
    """Return when each message has left the link for the next one."""
    free, departures = -math.inf, []
    for sent, _, num_bytes in deliveries:
        free = max(free, sent) + num_bytes * time_per_byte
        departures.append(free)
    return departures


def expected_arrivals(deliveries: Sequence[Delivery], link: Link) -> list[float]:
    """Return when each message should have arrived over `link`."""
    return [departure + link.latency for departure in _departures(deliveries, 1 / link.bandwidth)]
