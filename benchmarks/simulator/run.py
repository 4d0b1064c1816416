"""Predict each configuration, write the prediction down, then run it.

python -m benchmarks.simulator.run [--most-seconds 80] [--only NAME...] [--out FILE]

The results file is the state: a run that is cut short goes on where it stopped, and what is measured is never predicted
again. Without --out the first call begins `results/predictions.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, environment, format_table
from benchmarks.simulator.calibrate import Calibration, calibrate, costs_of
from benchmarks.simulator.configurations import CONFIGURATIONS
from benchmarks.simulator.ranks import Configuration, run_pipeline

from vpipe.report.measured_costs import MeasuredCosts
from vpipe.report.prediction import predict_step

Results = dict[str, Any]


def predict(configuration: Configuration, calibration: Calibration) -> dict[str, Any]:
    """Return what is predicted, and from which costs."""
    costs = costs_of(configuration, calibration)
    message_bytes = [configuration.message_bytes] * (configuration.num_stages - 1)
    found = predict_step(configuration.recipe, costs, message_bytes)
    return {
        "schedule": configuration.schedule,
        "num_ranks": configuration.num_ranks,
        "num_microbatches": configuration.num_microbatches,
        "predicted_ms": round(found.step_ms, 3),
        "predicted_bubble": round(found.bubble_fraction, 4),
        "predicted_at": _now(),
        "costs": _plain(costs),
    }


def _plain(costs: MeasuredCosts) -> dict[str, Any]:
    return {
        "work_ms": {f"{stage}{kind}": round(value, 4) for (stage, kind), value in sorted(costs.work_ms.items())},
        "overheads": {name: round(value, 4) for name, value in vars(costs.overheads).items() if value is not None},
    }


def measure(configuration: Configuration) -> dict[str, Any]:
    """Run a configuration and return its median batch, as rank 0 sees it."""
    (run,) = run_pipeline(configuration)
    return {
        "measured_ms": round(statistics.median(run.batch_ms), 3),
        "batch_ms": [round(value, 3) for value in run.batch_ms],
        "measured_at": _now(),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def error(row: dict[str, Any]) -> float:
    """Return the prediction's error, as a share of what was measured."""
    return float(row["predicted_ms"] / row["measured_ms"] - 1)


def summarise(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the claim."""
    done = [row for row in rows.values() if "measured_ms" in row]
    errors = [abs(error(row)) for row in done]
    return {
        "num_configurations": len(done),
        "mean_absolute_error": round(statistics.fmean(errors), 4),
        "mean_error": round(statistics.fmean(map(error, done)), 4),
        "worst_error": round(max(errors), 4),
        "kendall_tau": round(_kendall_tau([(row["predicted_ms"], row["measured_ms"]) for row in done]), 4),
    }


def _kendall_tau(pairs: list[tuple[float, float]]) -> float:
    """Return the share of pairs in the same order minus that in the other (Kendall 1938)."""
    signs = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in combinations(pairs, 2)]
    return (sum(sign > 0 for sign in signs) - sum(sign < 0 for sign in signs)) / len(signs) if signs else 1.0


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    header = ["configuration", "ranks", "microbatches", "predicted ms", "measured ms", "error"]
    lines = [
        [
            name,
            row["num_ranks"],
            row["num_microbatches"],
            f"{row['predicted_ms']:.1f}",
            f"{row['measured_ms']:.1f}",
            f"{error(row):+.1%}",
        ]
        for name, row in rows.items()
        if "measured_ms" in row
    ]
    print(format_table(header, lines))
    print(json.dumps(summarise(rows)))


def _write(path: Path, results: Results) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=2) + "\n")
    new.replace(path)


def _begin() -> Results:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "environment": environment() | {"commit": commit.stdout.strip()},
        "calibration": calibrate(),
        "configurations": {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most-seconds", type=float, default=float("inf"), help="begin nothing new after so long")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "predictions.json")
    arguments = parser.parse_args()
    start = time.monotonic()
    results: Results = json.loads(arguments.out.read_text()) if arguments.out.exists() else _begin()
    rows = results["configurations"]
    _write(arguments.out, results)
    for name in arguments.only:
        if "measured_ms" in rows.get(name, {}) or time.monotonic() - start > arguments.most_seconds:
            continue
        if name not in rows:
            rows[name] = predict(CONFIGURATIONS[name], results["calibration"])
            _write(arguments.out, results)
        rows[name] |= measure(CONFIGURATIONS[name])
        results["summary"] = summarise(rows)
        _write(arguments.out, results)
        print(
            f"{name:<28}{rows[name]['predicted_ms']:9.1f}{rows[name]['measured_ms']:9.1f}{error(rows[name]):+8.1%}",
            flush=True,
        )
    left = [name for name in arguments.only if "measured_ms" not in rows.get(name, {})]
    if left:
        print(f"{len(left)} left: run it again")
    else:
        show(rows)


if __name__ == "__main__":
    main()
