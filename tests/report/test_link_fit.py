"""Latency and bandwidth from arrivals: told apart where messages queue or differ in size, and only there."""

from __future__ import annotations

import math
import random

import pytest

from vpipe.report.link_fit import Delivery, fit_link


def deliveries(sent, latency, per_byte, sizes=None, seen=lambda index: True):
    free, found = 0.0, []
    for index, (time, size) in enumerate(zip(sent, sizes or [100.0] * len(sent), strict=True)):
        free = max(free, time) + size * per_byte
        found.append(Delivery(time, free + latency if seen(index) else None, size))
    return found


def test_messages_that_never_meet_show_their_delay_as_latency():
    link = fit_link(deliveries([0.0, 50.0, 100.0], 2.0, 0.03))
    assert (link.latency, link.bandwidth) == (pytest.approx(5.0), math.inf)


def test_messages_that_queue_show_both():
    link = fit_link(deliveries([0.0, 1.0, 2.0, 3.0, 40.0, 41.0], 2.0, 0.04))
    assert link.latency == pytest.approx(2.0, abs=0.05)
    assert link.bandwidth == pytest.approx(25.0, rel=0.01)


def test_sizes_show_both_without_a_queue():
    link = fit_link(deliveries([0.0, 50.0, 100.0, 150.0], 1.0, 0.02, sizes=[100.0, 200.0, 100.0, 200.0]))
    assert link.latency == pytest.approx(1.0, abs=0.05)
    assert link.bandwidth == pytest.approx(50.0, rel=0.02)


def test_messages_that_nobody_waited_for_still_fill_the_link():
    link = fit_link(deliveries([0.0, 0.5, 1.0, 1.5, 60.0], 0.5, 0.05, seen=lambda index: index % 2 == 0))
    assert link.bandwidth == pytest.approx(20.0, rel=0.02)


def test_noise_makes_no_bandwidth():
    draws = random.Random(4)
    noisy = [Delivery(50.0 * index, 50.0 * index + 0.3 + draws.random() / 10, 100.0) for index in range(40)]
    assert fit_link(noisy).bandwidth == math.inf


def test_without_an_arrival_nothing_is_known():
    assert fit_link([Delivery(1.0, None, 100.0)]) is None
    assert fit_link([]) is None
