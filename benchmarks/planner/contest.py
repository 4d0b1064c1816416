"""Contestants that differ in their cut: run in turn, round after round, and compared with the planned one."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import spread
from benchmarks.families.quiet import quietly
from benchmarks.planner.ranks import train_configs

from vpipe.config import RunConfig

__all__ = ["PLANNED", "measure_rounds", "summarise"]

PLANNED = "planned"
"""The contestant that plans itself; the others' cuts are given."""

Contestants = dict[str, dict[str, Any]]


def measure_rounds(
    title: str, contestants: Contestants, configs: Mapping[str, RunConfig], num_rounds: int, end: float
) -> bool:
    """Run all in turn until each has so many `rounds_ms`; return whether that was reached before `end`."""
    while len(contestants[PLANNED]["rounds_ms"]) < num_rounds:
        with tempfile.TemporaryDirectory() as folder:
            summaries = quietly(partial(train_configs, configs, Path(folder)), end)
        if summaries is None:
            return False
        if summaries[PLANNED]["plan"]["partition"] != contestants[PLANNED]["partition"]:
            raise RuntimeError("the run has planned something else than was predicted")
        for name, summary in summaries.items():
            contestants[name]["rounds_ms"].append(round(summary["iteration_ms"], 2))
        times = ", ".join(f"{name} {one['rounds_ms'][-1]:.1f}" for name, one in contestants.items())
        print(f"  {title}, round {len(contestants[PLANNED]['rounds_ms'])}: {times} ms", flush=True)
    return True


def summarise(contestants: Contestants) -> dict[str, Any]:
    """Return how the planned run does against each other one, from the rounds' pairs, and the predictions' errors."""
    rounds = {name: one["rounds_ms"] for name, one in contestants.items()}
    own = rounds.pop(PLANNED)
    over = {
        name: spread([other / mine for other, mine in zip(times, own, strict=True)]) for name, times in rounds.items()
    }
    medians = {name: spread(one["rounds_ms"])["median"] for name, one in contestants.items()}
    return {
        "speed_over": over,
        "best_naive": min(over, key=lambda name: float(over[name]["median"])),
        "measured_ms": medians,
        "prediction_error": {
            name: round(one["predicted_ms"] / medians[name] - 1, 4) for name, one in contestants.items()
        },
    }
