"""Metrics: lines on disk, rates by a clock that the test turns, and memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vpipe.report.metrics import MetricsWriter
from vpipe.runtime.memory.workspace import GpuPeak, WorkspaceMeter
from vpipe.schedule.action import Action, Kind
from vpipe.train import metrics
from vpipe.train.metrics import ThroughputMeter, peak_memory_bytes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_every_record_is_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"iteration": 1, "loss": 2.5})
        assert json.loads(path.read_text()) == {"iteration": 1, "loss": 2.5}
        writer.write({"iteration": 2, "loss": math.nan, "eval_loss": -math.inf})
    with MetricsWriter(path) as writer:
        writer.write({"iteration": 3})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[1:] == [{"iteration": 2, "loss": None, "eval_loss": None}, {"iteration": 3}]


def run(meter: ThroughputMeter, clock: Clock, *durations: float) -> None:
    meter.begin()
    for seconds in durations:
        clock.now += seconds
        meter.update(8)


def test_the_first_two_iterations_of_a_run_do_not_count() -> None:
    clock = Clock()
    meter = ThroughputMeter(window=3, clock=clock)
    assert (meter.samples_per_second, meter.iteration_ms) == (0, None)
    run(meter, clock, 10, 10, 1, 1, 2, 2, 2)
    assert meter.iteration_ms == pytest.approx(1600)
    assert meter.samples_per_second == pytest.approx(24 / 6)


def test_a_short_run_counts_what_it_has() -> None:
    clock = Clock()
    meter = ThroughputMeter(num_draining=1, clock=clock)
    run(meter, clock, 10)
    assert meter.iteration_ms is None
    run(meter, clock, 10, 4)
    assert meter.iteration_ms == pytest.approx(4000)


def test_filling_and_draining_do_not_count() -> None:
    clock = Clock()
    meter = ThroughputMeter(num_draining=1, clock=clock)
    run(meter, clock, 30, 9, 1, 1, 5)
    assert meter.iteration_ms == pytest.approx(1000)
    clock.now += 100
    run(meter, clock, 30, 4, 5)
    assert meter.iteration_ms == pytest.approx(2000)


def test_batches_that_are_not_whole_count_as_samples_and_not_as_iterations() -> None:
    clock = Clock()
    meter = ThroughputMeter(window=3, clock=clock)
    meter.begin()
    for seconds, size in ((10, 8), (10, 8), (2, 8), (1, 3), (2, 8), (1, 3), (2, 8)):
        clock.now += seconds
        meter.update(size, is_whole=size == 8)
    assert meter.iteration_ms == pytest.approx(2000)
    assert meter.samples_per_second == pytest.approx((8 + 3 + 8) / 5)


def test_pauses_do_not_count() -> None:
    clock = Clock()
    meter = ThroughputMeter(clock=clock)
    for _ in range(3):
        run(meter, clock, 1, 1)
        with meter.paused():
            clock.now += 50
    assert meter.iteration_ms == pytest.approx(1000)
    assert meter.samples_per_second == pytest.approx(8)


def test_peak_memory_grows_with_what_is_allocated_and_stays() -> None:
    before = peak_memory_bytes()
    assert before > 10 * 1024**2
    held = torch.ones(max(before, 64 * 1024**2) // 4)  # as much again as the process ever had
    during = peak_memory_bytes()
    assert during > before
    del held
    assert peak_memory_bytes() > 0.95 * during  # the kernel counts in batches


def test_the_peak_of_a_gpu_outlives_what_measures_single_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    device, peak = torch.device("cuda:0"), [700]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peak.__setitem__(0, 100))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    gpu = GpuPeak(device)
    meter = WorkspaceMeter(device, gpu)
    for microbatch in range(2):
        meter.run(lambda _: peak.__setitem__(0, 300), Action(0, Kind.F, microbatch), has_gradients=False)
    assert meter.excess(0) == 200
    assert peak_memory_bytes(SimpleNamespace(device=device, peak=gpu)) == 700


def test_peak_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_PROCESS_STATUS", Path("/nowhere/status"))
    assert peak_memory_bytes() > 10 * 1024**2
