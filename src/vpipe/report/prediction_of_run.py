"""The simulator put to the test: a finished run, predicted from the costs it measured, beside what it really took."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vpipe.config import read_config
from vpipe.config.planning.to_plan import to_plan
from vpipe.errors import ConfigError
from vpipe.plan.plan_file import plan_from_dict
from vpipe.report.measured_costs import MeasuredCosts, measure_costs
from vpipe.report.prediction import StepPrediction, predict_step
from vpipe.report.trace import read_timeline
from vpipe.runtime.trace import TraceEvent
from vpipe.schedule.action import COMMUNICATION, COMPUTE, MOVES, Action, Kind
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.simulate.critical_path import critical_path
from vpipe.schedule.simulate.idle import CAUSES, idle_times

__all__ = ["RunPrediction", "predict_run"]

_FILES = ("config.yml", "plan.json", "summary.json", "timeline.json")


@dataclass(frozen=True)
class RunPrediction:
    """What the simulator says of a run, and what the run says of itself."""

    prediction: StepPrediction
    costs: MeasuredCosts
    num_microbatches: int
    measured_step_ms: float
    """Mean over the iterations in the timeline, from which the costs are too."""
    measured_bubble_fraction: float

    @property
    def error(self) -> float:
        """Predicted over measured time of a step, less 1."""
        return self.prediction.step_ms / self.measured_step_ms - 1 if self.measured_step_ms else 0.0

    @property
    def idle_shares(self) -> dict[str, float]:
        """Idle time by cause, of all ranks' time, in what was simulated."""
        simulation = self.prediction.simulation
        total = simulation.schedule.num_ranks * simulation.makespan
        idle = idle_times(simulation)
        return {cause: math.fsum(rank[cause] for rank in idle) / total if total else 0.0 for cause in CAUSES}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as data for JSON, times in ms."""
        schedule = self.prediction.simulation.schedule
        return {
            "schedule": schedule.name,
            "num_ranks": schedule.num_ranks,
            "num_microbatches": self.num_microbatches,
            "step_ms": {
                "predicted": self.prediction.step_ms,
                "measured": self.measured_step_ms,
                "error": self.error,
            },
            "bubble_fraction": {
                "predicted": self.prediction.bubble_fraction,
                "measured": self.measured_bubble_fraction,
            },
            "simulated_batches": self.prediction.num_batches,
            "idle": self.idle_shares,
            "critical_path": [
                {"action": str(action), "start_ms": start, "end_ms": end}
                for action, start, end in critical_path(self.prediction.simulation)
            ],
            "stages": self._stages(),
            "links": [
                {
                    "source": source,
                    "target": target,
                    "latency_ms": link.latency,
                    "bandwidth_bytes_per_ms": None if math.isinf(link.bandwidth) else link.bandwidth,
                }
                for (source, target), link in self.costs.links.items()
            ],
            "overheads": vars(self.costs.overheads),
        }

    def _stages(self) -> list[dict[str, Any]]:
        work, schedule = self.costs.work_ms, self.prediction.simulation.schedule
        return [
            {
                "stage": stage,
                "rank": schedule.position_of(stage),
                **{f"{kind}_ms": work[stage, kind] for kind in Kind if (stage, kind) in work},
            }
            for stage in range(schedule.num_stages)
        ]

    def lines(self) -> list[str]:
        """Return everything as text."""
        schedule, step = self.prediction.simulation.schedule, self.prediction.step_ms
        bubbles = self.prediction.bubble_fraction, self.measured_bubble_fraction
        return [
            f"{schedule.name}, {schedule.num_ranks} ranks, {self.num_microbatches} microbatches",
            "",
            f"{'':<16}{'predicted':>12}{'measured':>12}{'error':>10}",
            f"{'step':<16}{step:>9.1f} ms{self.measured_step_ms:>9.1f} ms{self.error:>+10.1%}",
            f"{'bubble':<16}{bubbles[0]:>12.1%}{bubbles[1]:>12.1%}",
            "",
            f"{'idle':<16}{self._idle_text()}",
            f"{'critical path':<16}{self._path_text()}",
            "",
            *self._stage_lines(),
            "",
            *self._overhead_lines(),
        ]

    def _idle_text(self) -> str:
        shares = self.idle_shares
        shown = sorted((cause for cause in CAUSES if shares[cause] >= 5e-4), key=lambda cause: -shares[cause])
        return ", ".join(f"{shares[cause]:.1%} {cause}" for cause in shown) or "never"

    def _path_text(self) -> str:
        """Say how the longest chain is made up: time by rank, and on the way between ranks."""
        simulation = self.prediction.simulation
        parts: defaultdict[str, float] = defaultdict(float)
        for action, start, end in critical_path(simulation):
            rank = f"rank {simulation.schedule.rank_of(action)}"
            place = rank if action.kind in COMPUTE else "moves" if action.kind in MOVES else "messages"
            parts[place] += end - start
        total = math.fsum(parts.values())
        return (
            ", ".join(f"{parts[place] / total:.1%} {place}" for place in sorted(parts, reverse=True)) if total else "-"
        )

    def _stage_lines(self) -> list[str]:
        there = {kind for _, kind in self.costs.work_ms}
        kinds = [kind for kind in Kind if kind in there]
        widths = [max(10, len(kind) + 5) for kind in kinds]
        heads = [f"{f'{kind} ms':>{width}}" for kind, width in zip(kinds, widths, strict=True)]
        lines = [f"{'stage':<8}{'rank':<6}" + "".join(heads)]
        for row in self._stages():
            times = [row.get(f"{kind}_ms", 0.0) for kind in kinds]
            cells = "".join(f"{time:>{width}.3f}" for time, width in zip(times, widths, strict=True))
            lines.append(f"{row['stage']:<8}{row['rank']:<6}{cells}")
        return lines

    def _overhead_lines(self) -> list[str]:
        extra = self.costs.overheads
        lines = [
            f"{'link':<16}{source} to {target}: {link.latency:.3f} ms"
            + ("" if math.isinf(link.bandwidth) else f", {link.bandwidth / 1e3:.3g} MB/s")
            for (source, target), link in self.costs.links.items()
        ]
        added = f"{extra.gap_ms:.3f} ms an action, {extra.send_ms:.3f} ms a send, {extra.receive_ms:.3f} ms a receive"
        return [*lines, f"{'executor':<16}{added}, {extra.turn_ms:.3f} ms from batch to batch"]


def predict_run(directory: Path) -> RunPrediction:
    """Read a finished run's directory and predict the run from the costs in its timeline.

    Raises:
        ConfigError: there is no such run, or it has not finished.
        ScheduleError: its schedule is built differently now, or not all of its stages are in the timeline.
    """
    if missing := [name for name in _FILES if not (directory / name).is_file()]:
        raise ConfigError(
            f"'{directory}' has no {', '.join(missing)}; give the directory of a finished run, such as runs/latest"
        )
    content, summary = (_read(directory / name) for name in ("plan.json", "summary.json"))
    if missing := [key for key in ("stages", "cuts", "num_microbatches") if key not in content]:
        raise ConfigError(
            f"'{directory / 'plan.json'}' has no {', '.join(missing)}; it is of an older version of VPipe"
        )
    events = read_timeline(directory / "timeline.json")
    plan = plan_from_dict(_with_ranks(content), to_plan(read_config(directory / "config.yml").config))
    _, num_microbatches = plan.sizes
    _check_same(plan.build(), events)
    message_bytes = [float(cut["forward_bytes"]) for cut in content["cuts"]]
    costs = measure_costs(events, _bytes_by_send(message_bytes))
    return RunPrediction(
        predict_step(plan, costs, message_bytes),
        costs,
        num_microbatches,
        _measured_step_ms(events, summary),
        summary["bubble_fraction"],
    )


def _with_ranks(content: dict[str, Any]) -> dict[str, Any]:
    """Return a plan file's content with its ranks, which older files do not count."""
    ranks = [stage["rank"] for stage in content["stages"]]
    num_ranks = max(ranks) + 1
    return {"num_ranks": num_ranks, "stages_per_rank": len(ranks) // num_ranks, **content}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"'{path}' is not the JSON that a run writes ({error}); was the run cut short?") from error


def _check_same(schedule: Schedule, events: Sequence[TraceEvent]) -> None:
    """Refuse a run of another order than the one that would be simulated; asynchronous windows begin anywhere."""
    if not schedule.synchronous:
        return
    first = min((event.iteration for event in events), default=0)
    for rank, order in enumerate(schedule.orders):
        seen = [event for event in events if event.rank == rank and event.iteration == first]
        ran = dict.fromkeys(event.action for event in seen if event.action.kind not in COMMUNICATION)
        if tuple(ran) != order:
            raise ConfigError(
                f"rank {rank} ran {len(ran)} computations of iteration {first + 1} in another order than schedule "
                f"'{schedule.name}' of {len(order)} has now; simulate a run of this version of VPipe"
            )


def _bytes_by_send(message_bytes: Sequence[float]) -> dict[Action, float]:
    """Return the size of each send; as the simulator has it, a gradient is as large as what it is the gradient of."""
    sizes = {Action(stage, Kind.SEND_F, 0): size for stage, size in enumerate(message_bytes)}
    return sizes | {Action(stage + 1, Kind.SEND_B, 0): size for stage, size in enumerate(message_bytes)}


def _measured_step_ms(events: Sequence[TraceEvent], summary: Mapping[str, Any]) -> float:
    """Return the mean time between updates on rank 0, of the iterations in the timeline if there are several."""
    ends: dict[int, float] = {}
    for event in events:
        if event.rank == 0 and event.action.kind is Kind.STEP:
            ends[event.iteration] = max(ends.get(event.iteration, 0.0), event.end_ns / 1e6)
    periods = [later - earlier for earlier, later in pairwise(ends[iteration] for iteration in sorted(ends))]
    return statistics.fmean(periods) if periods else float(summary["iteration_ms"] or 0.0)
