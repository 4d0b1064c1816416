"""What every benchmark needs: contestants run in turn, medians with their spread, the environment, a table.

A contestant is a module that is run under torchrun (or alone) and prints one JSON object as its last line:
`{"batch_ms": [...]}`, the time of each measured batch in milliseconds. Launch and warm-up do not count. Those with a
pipeline call `gc.freeze()` before they start: none is charged for the collector walking through what imports left.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
BUSY_LOAD = 0.5


@dataclass(frozen=True)
class Contestant:
    """One competitor: `module` run on `num_ranks` processes (1: without torchrun) with `arguments` of its own."""

    name: str
    module: str
    arguments: tuple[str, ...] = ()
    num_ranks: int = 1
    threads_per_rank: int = 1

    @property
    def exists(self) -> bool:
        """Tell whether its module is there."""
        return importlib.util.find_spec(self.module) is not None

    def command(self, arguments: Mapping[str, object]) -> list[str]:
        """Return the command line that measures one case."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.num_ranks)]
        start = [sys.executable, *(launcher if self.num_ranks > 1 else []), "-m", self.module]
        options = [text for name, value in arguments.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        return [*start, *self.arguments, *options]


def measure(contestant: Contestant, arguments: Mapping[str, object]) -> dict[str, Any]:
    """Run `contestant` once and return what it printed.

    Raises:
        RuntimeError: it failed; its output is in the message.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": str(contestant.threads_per_rank)}
    command = contestant.command(arguments)
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return report


def measure_in_turn(
    contestants: Sequence[Contestant], arguments: Mapping[str, object], num_rounds: int
) -> dict[str, list[dict[str, Any]]]:
    """Run the contestants one after another, `num_rounds` times (A B A B), and return each one's report per round."""
    reports: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in contestants}
    for round_ in range(num_rounds):
        for contestant in contestants:
            report = measure(contestant, arguments)
            reports[contestant.name].append(report)
            print(f"  round {round_ + 1}/{num_rounds}  {contestant.name:<24} {median_ms(report):9.2f} ms", flush=True)
    return reports


def median_ms(report: Mapping[str, Any]) -> float:
    """Return the median batch time of one run."""
    return float(statistics.median(report["batch_ms"]))


def periods_ms(stamps: Sequence[float]) -> list[float]:
    """Return the times between successive stamps (seconds of one clock) in milliseconds."""
    return [(end - start) * 1e3 for start, end in itertools.pairwise(stamps)]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median, extremes and all of `values`, rounded to four digits after the point."""
    numbers = [round(value, 4) for value in values]
    return {"median": round(statistics.median(values), 4), "min": min(numbers), "max": max(numbers), "rounds": numbers}


def speed_over(baseline_ms: Sequence[float], batch_ms: Sequence[float]) -> dict[str, Any]:
    """Return how many times as fast as the baseline, from the rounds' pairs."""
    return spread([base / own for base, own in zip(baseline_ms, batch_ms, strict=True)])


def parse_run(doc: str | None, contestants: Sequence[Contestant], out: Path) -> tuple[list[Contestant], int, Path]:
    """Read a driver's command line and return the contestants to run, the number of rounds and where results go."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rounds", type=int, default=5)
    parser.add_argument("--contestants", nargs="+", choices=[item.name for item in contestants], help="default: all")
    parser.add_argument("--out", type=Path, default=out)
    arguments = parser.parse_args()
    wanted = arguments.contestants or [item.name for item in contestants if item.exists]
    return [item for item in contestants if item.name in wanted], arguments.num_rounds, arguments.out


def environment() -> dict[str, Any]:
    """Describe machine and software."""
    names = (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line)
    if (load := os.getloadavg()[0]) > BUSY_LOAD:
        print(f"warning: load average is {load:.2f}; others are using this machine, so the numbers are rough")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": next(names, "unknown"),
        "num_cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average_before": round(load, 2),
        "sleep_overshoot_ms": round(_sleep_overshoot_ms(), 3),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _sleep_overshoot_ms(asked_ms: float = 5.0, num_samples: int = 40) -> float:
    overshoots = []
    for _ in range(num_samples):
        start = time.perf_counter()
        time.sleep(asked_ms / 1e3)
        overshoots.append((time.perf_counter() - start) * 1e3 - asked_ms)
    return statistics.median(overshoots)


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write `results` as JSON, readable in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"wrote {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table, aligned so that it reads on a terminal too."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
