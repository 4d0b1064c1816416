"""What came out of a run: `summary.json` and `timeline.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpipe.plan.prediction import Prediction
from vpipe.report.bubble import between_iterations
from vpipe.report.metrics import finite
from vpipe.report.summary import summarize_trace
from vpipe.report.trace import write_timeline
from vpipe.runtime.comm.world import World
from vpipe.runtime.pipeline import Pipeline
from vpipe.runtime.trace import TraceEvent
from vpipe.schedule.memory import peak_activations
from vpipe.train.metrics import peak_memory_bytes
from vpipe.train.prediction import compare_prediction
from vpipe.train.stretches import Stretch, choose_measured
from vpipe.workload.setup import Setup

__all__ = ["HeldOut", "RankOutcome", "count_filling", "summarize_run"]


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation gave: the loss, and what is told beside it."""

    loss: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RankOutcome:
    """What one rank knows at the end.

    `held_out` is None where nothing was evaluated. `metrics` are those of the last iteration. `iteration_ms` is None
    where no iteration was followed by another one that counts; `events` are this rank's.
    """

    final_loss: float
    num_skipped: int
    held_out: HeldOut | None
    metrics: Mapping[str, float]
    iteration_ms: float | None
    events: Sequence[TraceEvent]
    stretches: Sequence[Stretch]


def summarize_run(
    pipeline: Pipeline,
    setup: Setup,
    world: World,
    outcome: RankOutcome,
    run_directory: Path,
    prediction: Prediction | None = None,
) -> dict[str, Any]:
    """Join what all ranks know and return it as the summary; rank 0 writes the files. Collective.

    `prediction` is what was expected of the run.
    """
    filling = count_filling(pipeline)
    size = setup.config.train.batch_size
    stretch, measured = choose_measured(outcome.stretches, filling, lambda index: setup.batch_size(index) < size)
    first, stop = max(stretch.start, measured.start - filling), min(stretch.stop, measured.stop + 1)
    mine = {
        "skipped_updates": outcome.num_skipped,
        "bytes_sent": pipeline.transport.bytes_sent,
        "bytes_received": pipeline.transport.bytes_received,
        "peak_memory_bytes": peak_memory_bytes(world),
        "memory_by_kind": dict(pipeline.ledger.peak.by_kind),
        "peak_ledger_bytes": pipeline.ledger.peak.total,
        "bytes_offloaded": pipeline.host_link.bytes_offloaded if pipeline.host_link else 0,
        "weight_versions": max(held.weights.num_sets for held in pipeline.held.values()),
        "iteration_ms": outcome.iteration_ms,
        "events": [event for event in outcome.events if first <= event.iteration < stop],
    }
    everyone: list[dict[str, Any]] = world.gather(mine, "all ranks to tell what they measured")
    around = [event for rank in everyone for event in rank.pop("events")]
    inside = between_iterations(around, *measured)
    drawn = [event for event in around if measured.start <= event.iteration < measured.stop]
    config, iterations, held_out = setup.config, setup.total_iterations, outcome.held_out
    seen_ms = [rank.pop("iteration_ms") for rank in everyone]
    # As rank 0 saw it, which has a microbatch first and last.
    iteration_ms = seen_ms[0] or _span_ms(inside) / measured.num_iterations
    summary: dict[str, Any] = {
        "schedule": config.pipeline.schedule,
        "iterations": iterations,
        "num_samples": setup.num_samples(iterations),
        "final_loss": finite(outcome.final_loss),
        "eval_loss": finite(held_out.loss if held_out else None),
        **({"metrics": finite(outcome.metrics)} if outcome.metrics else {}),
        **({"eval_metrics": finite(held_out.metrics)} if held_out and held_out.metrics else {}),
        "samples_per_second": size / iteration_ms * 1e3 if iteration_ms else 0.0,
        "iteration_ms": iteration_ms,
        "measured_iterations": [measured.start + 1, measured.stop],
        **{key: [rank[key] for rank in everyone] for key in everyone[0]},
        **compare_prediction(prediction, iteration_ms, [rank["peak_ledger_bytes"] for rank in everyone]),
        **summarize_trace(drawn, inside),
    }
    for row in summary["ranks"]:
        row["blocks"] = [block for stage in row["stages"] for block in pipeline.plan.cut.range_of(stage)]
    if world.rank == 0:
        write_timeline(run_directory / "timeline.json", drawn)
        (run_directory / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def count_filling(pipeline: Pipeline) -> int:
    """Count the iterations until an asynchronous pipeline is full; 0 for a synchronous one."""
    programs = pipeline.programs
    if programs.synchronous:
        return 0
    in_flight = max(peak_activations(programs.sample)) * programs.sample.placement.stages_per_rank
    return math.ceil(round(in_flight) / programs.num_microbatches)


def _span_ms(events: Sequence[TraceEvent]) -> float:
    start = min((event.start_ns for event in events), default=0)
    return (max((event.end_ns for event in events), default=0) - start) / 1e6
