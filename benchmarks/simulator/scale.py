"""How the cost of simulating grows: 1F1B of more and more ranks and microbatches, each in a process of its own.

python -m benchmarks.simulator.scale [--out FILE]

Seconds are those of one core, and count building the schedule and simulating it, not Python's start. The peak is that
of the process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.common import ROOT, environment, format_table, write_results

SIZES = ((16, 32), (32, 64), (64, 128), (128, 256), (256, 512), (512, 1024), (1024, 1024), (1024, 2048))


def measure_apart(num_ranks: int, num_microbatches: int) -> dict[str, float]:
    """Do it in a new process, whose peak is its own."""
    command = [sys.executable, "-m", "benchmarks.simulator.scale_one", str(num_ranks), str(num_microbatches)]
    # Started by a small shell: a process forked from a large one begins with the large one's peak.
    done = subprocess.run(["sh", "-c", '"$@"', "sh", *command], cwd=ROOT, capture_output=True, text=True, check=True)
    row: dict[str, float] = json.loads(done.stdout)
    return row


def table_row(row: dict[str, float]) -> list[str]:
    """Return one line of the table."""
    seconds, actions = row["build_seconds"] + row["simulate_seconds"], row["num_actions"]
    return [
        f"{row['num_ranks']:,}",
        f"{row['num_microbatches']:,}",
        f"{actions:,}",
        f"{row['build_seconds']:.2f}",
        f"{row['simulate_seconds']:.2f}",
        f"{seconds / actions * 1e6:.2f}",
        f"{row['peak_bytes'] / 2**20:,.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "scale.json")
    arguments = parser.parse_args()
    surroundings = environment()
    rows = []
    for size in SIZES:
        rows.append(measure_apart(*size))
        print(*size, rows[-1], flush=True)
    write_results(arguments.out, {"environment": surroundings, "rows": rows})
    header = ["ranks", "microbatches", "actions", "build s", "simulate s", "us per action", "peak MiB"]
    print(format_table(header, [table_row(row) for row in rows]))


if __name__ == "__main__":
    main()
