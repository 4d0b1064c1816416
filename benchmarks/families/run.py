"""Run each family on emulated devices and compare its step with its own simulated one, and two of them with torch's.

python -m benchmarks.families.run [--num-rounds 3] [--most-seconds 80] [--out FILE]

Predictions are made, and written down, before anything is measured. All run in turn, round after round; what ran while
other programs computed runs again. The results file is the state: a run that is cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import environment, format_table, speed_over, spread
from benchmarks.families.peer_torch import PEERS, run_torch
from benchmarks.families.quiet import quietly
from benchmarks.simulator.calibrate import Calibration, calibrate_crowd, costs_of
from benchmarks.simulator.configurations import MESSAGE_BYTES
from benchmarks.simulator.devices import StageTimes
from benchmarks.simulator.ranks import Configuration, run_pipeline

from vpipe.report.measured_costs import MeasuredCosts, Overheads
from vpipe.report.prediction import predict_step
from vpipe.schedule.action import Kind
from vpipe.schedule.registry import find_entry
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import simulate

NUM_RANKS, NUM_MICROBATCHES = 4, 8
TIME_MS = 10.0  # of F, I and W of a rank's share
TARGET = 1.05
NUM_CALIBRATIONS = 3  # one alone may fall into a hiccup of the machine


def _configure(name: str, schedule: str | None = None, **options: Any) -> Configuration:
    schedule = schedule or name
    per_rank = 2 if schedule == "searched" else find_entry(schedule).default_stages_per_rank
    times = StageTimes(*(TIME_MS / per_rank,) * 3)
    stages = (times,) * NUM_RANKS * per_rank
    return Configuration(name, schedule, NUM_RANKS, NUM_MICROBATCHES, stages, **{"num_batches": 10, **options})


FAMILIES = {
    configuration.name: configuration
    for configuration in (
        _configure("naive", num_batches=4),
        _configure("gpipe"),
        _configure("1f1b"),
        _configure("1f1b, eager depth", "1f1b", depths=(6, 4, 2, 0)),
        _configure("interleaved"),
        _configure("looped-bfs"),
        _configure("zb-h1"),
        _configure("zb-h2"),
        _configure("zb-v"),
        _configure("v-half"),
        _configure("v-min"),
        _configure("dualpipe-v"),
        _configure("searched"),
        _configure("pipedream"),
        _configure("pipedream, vertical sync", "pipedream", vertical_sync=True),
        _configure("pipedream-2bw", macrobatch=True),
    )
}


def predict(configuration: Configuration, calibration: Calibration) -> dict[str, Any]:
    """Simulate one step: with the measured costs of devices, executor and messages, and with nothing but F, I and W."""
    message_bytes = [configuration.message_bytes] * (configuration.num_stages - 1)
    found = predict_step(configuration.recipe, costs_of(configuration, calibration), message_bytes)
    return {"simulated_ms": round(found.step_ms, 3), "bare_ms": round(_bare_ms(configuration), 3)}


def _bare_ms(configuration: Configuration) -> float:
    recipe = configuration.recipe
    if recipe.synchronous:
        schedule = recipe.build()
        costs = Costs.from_rank_shares(schedule.placement, forward=TIME_MS, input_grad=TIME_MS, weight_grad=TIME_MS)
        return simulate(schedule, costs).makespan
    work = {
        (stage, kind): time
        for stage, times in enumerate(configuration.stages)
        for kind, time in (
            (Kind.F, times.forward_ms),
            (Kind.I, times.input_grad_ms),
            (Kind.W, times.weight_grad_ms),
        )
    }
    nothing = MeasuredCosts(work, Overheads(), {})
    return predict_step(recipe, nothing, [0.0] * (configuration.num_stages - 1)).step_ms


def _begin(end: float) -> dict[str, Any] | None:
    surroundings = environment()
    pairs = str(NUM_RANKS // 2)
    found = [quietly(lambda: calibrate_crowd(NUM_RANKS // 2, MESSAGE_BYTES), end) for _ in range(NUM_CALIBRATIONS)]
    if None in found:
        return None
    calibration = {"emulated": {pairs: _medians(found)}, "slow_link_adds_ms": 0.0}
    return {
        "environment": surroundings,
        "calibration": calibration,
        "predicted_at": _now(),
        "families": {
            name: predict(configuration, calibration) | {"rounds_ms": []} for name, configuration in FAMILIES.items()
        },
        "torch": {name: {"rounds_ms": []} for name in PEERS},
    }


def _medians(found: Sequence[Any]) -> Any:
    """Return the median of each number in dictionaries and lists of the same form."""
    first = found[0]
    if isinstance(first, dict):
        return {key: _medians([each[key] for each in found]) for key in first}
    if isinstance(first, list):
        return [_medians(values) for values in zip(*found, strict=True)]
    known = [each for each in found if each is not None]
    return statistics.median(known) if known else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def measure_rounds(results: dict[str, Any], num_rounds: int, end: float, path: Path) -> bool:
    """Run what is left, round after round, each peer right after its family; return whether nothing is left."""
    for number in range(num_rounds):
        for name, configuration in FAMILIES.items():
            for kind in ("families", "torch") if name in PEERS else ("families",):
                rounds = results[kind][name]["rounds_ms"]
                if len(rounds) > number:
                    continue
                batch_ms = quietly(partial(_measure, kind, configuration), end)
                if batch_ms is None:
                    return False
                rounds.append(round(statistics.median(batch_ms), 3))
                results["measured_at"] = _now()
                _write(path, results)
                print(f"round {number + 1}  {kind:<9} {name:<26}{rounds[-1]:9.2f} ms", flush=True)
    return True


def _measure(kind: str, configuration: Configuration) -> list[float]:
    return run_torch(configuration) if kind == "torch" else run_pipeline(configuration)[0].batch_ms


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=2) + "\n")
    new.replace(path)


def show(results: dict[str, Any]) -> None:
    """Print both tables."""
    rows = []
    for name, row in results["families"].items():
        measured = spread(row["rounds_ms"])
        ratios = spread([value / row["simulated_ms"] for value in row["rounds_ms"]])
        rows.append(
            [
                f"`{name}`",
                f"{measured['median']:.1f}",
                f"{row['simulated_ms']:.1f}",
                f"{ratios['median']:.3f} ({ratios['min']:.3f} to {ratios['max']:.3f})",
                "yes" if ratios["median"] <= TARGET else "no",
                f"{row['bare_ms']:.1f}",
                f"{measured['median'] / row['bare_ms']:.3f}",
            ]
        )
    header = ["family", "step [ms]", "simulated", "step / simulated", f"<= {TARGET}", "F, I, W alone", "step / that"]
    print(format_table(header, rows))
    rows = []
    for name, row in results["torch"].items():
        own = results["families"][name]["rounds_ms"]
        speed = speed_over(row["rounds_ms"], own)
        rows.append(
            [
                f"`{name}`",
                PEERS[name].__name__,
                f"{spread(own)['median']:.1f}",
                f"{spread(row['rounds_ms'])['median']:.1f}",
                f"{speed['median']:.3f} ({speed['min']:.3f} to {speed['max']:.3f})",
            ]
        )
    print(format_table(["VPipe", "torch", "VPipe [ms]", "torch [ms]", "VPipe is so many times as fast"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--most-seconds", type=float, default=float("inf"), help="begin nothing new after so long")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "families.json")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.most_seconds
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else _begin(end)
    if results is not None:
        _write(arguments.out, results)
    if results is not None and measure_rounds(results, arguments.num_rounds, end, arguments.out):
        show(results)
    else:
        print("not all is measured: run it again")


if __name__ == "__main__":
    main()
