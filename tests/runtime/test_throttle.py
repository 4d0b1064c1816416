"""Slow links: when messages leave, by a clock that does not run; and that nothing but time changes."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vpipe.errors import ConfigError
from vpipe.launch.local import launch_local
from vpipe.runtime.comm import throttle as module
from vpipe.runtime.comm.throttle import SlowLink, emulate_slow_links, throttle
from vpipe.runtime.comm.transport import Transport
from vpipe.runtime.comm.world import World
from vpipe.schedule.registry import build_schedule

MESSAGE = [torch.zeros(250)]  # 1000 bytes


class Group:
    """Notes what is sent, by number; can refuse."""

    def __init__(self, error=None):
        self.sent, self.error = [], error
        self.taken = False

    def send(self, tensors, peer, tag):
        if self.error is not None:
            raise self.error
        self.sent.append(tag)
        return self

    def wait(self):
        self.taken = True
        return True

    def is_completed(self):
        return self.taken

    def recv(self, tensors, peer, tag):
        return "received"


@pytest.fixture
def sleeps(monkeypatch):
    """Stop the clock at 50 s and return how long the links' threads sleep, in ms: time until each message leaves."""
    asked = []

    def sleep(seconds):
        asked.append(round(seconds * 1e3, 6))

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: 50.0, sleep=sleep))
    return asked


def send_three(groups, key):
    works = [groups[key].send(MESSAGE, key[1], tag) for tag in range(3)]
    for work in works:
        assert work.wait()


def test_messages_occupy_the_link_one_after_another_and_are_under_way_together(sleeps):
    group = Group()
    groups = throttle({(0, 1, True): group}, SlowLink(latency_ms=5.0, bandwidth_bytes_per_ms=500.0))
    send_three(groups, (0, 1, True))
    assert group.sent == [0, 1, 2]
    assert sleeps == [7.0, 9.0, 11.0]


def test_latency_alone_makes_no_queue(sleeps):
    send_three(throttle({(0, 1, True): Group()}, SlowLink(latency_ms=5.0)), (0, 1, True))
    assert sleeps == [5.0, 5.0, 5.0]


def test_activations_and_gradients_of_one_direction_share_a_link_and_directions_do_not(sleeps):
    keys = [(1, 0, False), (1, 0, True), (0, 1, True)]
    groups = throttle({key: Group() for key in keys}, SlowLink(bandwidth_bytes_per_ms=500.0))
    for key in keys:
        groups[key].send(MESSAGE, key[1], 0).wait()
    assert sleeps == [2.0, 4.0, 2.0]


def test_a_send_returns_while_the_message_is_still_held_back(monkeypatch):
    may_go = threading.Event()
    clock = SimpleNamespace(perf_counter=lambda: 50.0, sleep=lambda seconds: may_go.wait())
    monkeypatch.setattr(module, "time", clock)
    group = Group()
    work = throttle({(0, 1, True): group}, SlowLink(1.0))[0, 1, True].send(MESSAGE, 1, 7)
    assert group.sent == []
    assert not work.is_completed()
    may_go.set()
    assert work.wait()
    assert group.sent == [7]
    assert work.is_completed()


def test_what_the_send_raises_reaches_the_rank_that_waits(sleeps):
    groups = throttle({(0, 1, True): Group(RuntimeError("connection reset"))}, SlowLink())
    work = groups[0, 1, True].send(MESSAGE, 1, 0)
    with pytest.raises(RuntimeError, match="connection reset"):
        work.wait()
    assert work.is_completed()


def test_a_stand_in_is_found_by_its_group_and_receives_as_ever():
    group = Group()
    stand_in = throttle({(0, 1, True): group}, SlowLink(1.0))[0, 1, True]
    assert {group: "here"}[stand_in] == "here"
    assert stand_in != Group()
    assert stand_in.recv(MESSAGE, 0, 0) == "received"


@pytest.mark.parametrize("numbers", [(-1.0, None), (0.0, 0.0), (1.0, -5.0)])
def test_impossible_links_are_refused(numbers):
    with pytest.raises(ConfigError, match="latency of at least 0 ms and a bandwidth above 0"):
        SlowLink(*numbers)


def test_messages_that_are_matched_by_order_are_not_held_back():
    with World.join() as world:
        transport = Transport(build_schedule("1f1b", 1, 1), world, ordered=True)
        with pytest.raises(ConfigError, match="with gloo only"):
            emulate_slow_links(transport, SlowLink(1.0))


def test_slow_links_change_no_bit(tmp_path):
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    launch_local(["throttle_toys:run_both", str(tmp_path)], 2, run_directory=tmp_path, environment=environment)
    for rank in range(2):
        for (losses, weights), (slow_losses, slow_weights) in torch.load(tmp_path / f"slow.{rank}.pt").values():
            assert len(losses) == 3
            assert slow_losses == losses
            assert all(torch.equal(one, other) for one, other in zip(weights, slow_weights, strict=True))
