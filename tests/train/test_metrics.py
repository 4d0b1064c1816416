"""Metrics: lines on disk, rates by a clock that the test turns, memory, and losses that are no numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from vpipe.errors import NonFiniteLossError
from vpipe.train import metrics
from vpipe.train.metrics import MetricsWriter, ThroughputMeter, peak_memory_bytes, validate_loss


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


def test_rates_leave_out_the_first_iterations() -> None:
    clock = Clock()
    meter = ThroughputMeter(skip=2, window=3, clock=clock)
    assert (meter.samples_per_second, meter.overall_samples_per_second, meter.iteration_ms) == (0, 0, 0)
    for seconds in (10, 10, 1, 1, 2, 2, 2):
        clock.now += seconds
        meter.update(8)
    assert meter.overall_samples_per_second == pytest.approx(5 * 8 / 8)
    assert meter.iteration_ms == pytest.approx(1600)
    assert meter.samples_per_second == pytest.approx(24 / 6)


def test_a_short_run_counts_all_iterations() -> None:
    clock = Clock()
    meter = ThroughputMeter(skip=2, clock=clock)
    for _ in range(2):
        clock.now += 4
        meter.update(8)
        assert meter.overall_samples_per_second == pytest.approx(2)
        assert meter.iteration_ms == pytest.approx(4000)


def test_pauses_do_not_count() -> None:
    clock = Clock()
    meter = ThroughputMeter(skip=0, clock=clock)
    for _ in range(3):
        clock.now += 1
        meter.update(8)
        with meter.paused():
            clock.now += 50
    assert meter.overall_samples_per_second == pytest.approx(8)
    assert meter.samples_per_second == pytest.approx(8)
    assert meter.elapsed_s == pytest.approx(153)


def test_peak_memory_grows_with_what_is_allocated_and_stays() -> None:
    before = peak_memory_bytes()
    assert before > 10 * 1024**2
    held = torch.ones(max(before, 64 * 1024**2) // 4)  # as much again as the process ever had
    during = peak_memory_bytes("cpu")
    assert during > before
    del held
    assert peak_memory_bytes() > 0.95 * during  # the kernel counts in batches


def test_peak_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_PROCESS_STATUS", Path("/nowhere/status"))
    assert peak_memory_bytes() > 10 * 1024**2


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_says_when_and_what_to_do(loss: float) -> None:
    with pytest.raises(NonFiniteLossError, match=rf"became {loss} at iteration 12 with learning rate 0.03; lower"):
        validate_loss(loss, 12, 0.03)


def test_other_losses_are_fine() -> None:
    validate_loss(0.0, 0)
    validate_loss(-1e30, 1)
