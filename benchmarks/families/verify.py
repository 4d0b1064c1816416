"""Run `vpipe verify` on a small BERT with dropout in every family, on two ranks and four, one stage per rank and two.

python -m benchmarks.families.verify [--most-seconds 80] [--out FILE]

The results file is the state: a run that is cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import environment, format_table

from vpipe.errors import ScheduleError
from vpipe.schedule.registry import SCHEDULES, build_schedule

CONFIG = """\
log_directory: {folder}
model: {{num_layers: 5, hidden_size: 64, num_heads: 2, vocab_size: 200, dropout: 0.1, attention_dropout: 0.1}}
data: {{synthetic_data: true, sequence_length: 16}}
pipeline: {{schedule: {schedule}, num_ranks: {ranks}, stages_per_rank: {stages}, num_microbatches: {size}}}
optimizer: {{clip_grad_norm: 0.5}}
train: {{batch_size: {batch}, iterations: 2}}
launch: {{device: cpu, threads_per_rank: 1}}
"""


def cases() -> list[tuple[str, int, int]]:
    """Return every family with the ranks and stages per rank that it can have."""
    found = []
    for ranks in (2, 4):
        for name in SCHEDULES:
            for stages in (1, 2):
                try:
                    build_schedule(name, ranks, _size(name, ranks), stages_per_rank=stages)
                except ScheduleError:
                    continue
                found.append((name, ranks, stages))
    return found


def _size(schedule: str, ranks: int) -> int:
    # No multiple of the ranks, but where an update is made of as many microbatches as there are ranks.
    return 2 * ranks + (schedule != "pipedream-2bw")


def verify(schedule: str, ranks: int, stages: int) -> dict[str, Any]:
    """Run `vpipe verify` and return what it reports."""
    with tempfile.TemporaryDirectory() as folder:
        path, size = Path(folder) / "run.yml", _size(schedule, ranks)
        content = {"schedule": schedule, "ranks": ranks, "stages": stages, "size": size, "batch": 2 * size}
        path.write_text(CONFIG.format(folder=folder, **content))
        command = [sys.executable, "-m", "vpipe", "verify", str(path), "--format", "json"]
        done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stderr}")
    report: dict[str, Any] = json.loads(done.stdout)
    return {
        "schedule": schedule,
        "num_ranks": ranks,
        "stages_per_rank": stages,
        "synchronous": report["synchronous"],
        "equal": report["equal"],
        "tensors": sum(item["num_tensors"] for item in report["comparisons"].values()),
        "different": sum(item["num_different"] for item in report["comparisons"].values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most-seconds", type=float, default=float("inf"), help="begin nothing new after so long")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "verify.json")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.most_seconds
    results: dict[str, Any] = (
        json.loads(arguments.out.read_text()) if arguments.out.exists() else {"environment": environment(), "rows": []}
    )
    rows = results["rows"]
    done = {(row["schedule"], row["num_ranks"], row["stages_per_rank"]) for row in rows}
    left = [case for case in cases() if case not in done]
    while left and time.monotonic() < end:
        rows.append(verify(*left.pop(0)))
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        print(rows[-1], flush=True)
    header = ("schedule", "num_ranks", "stages_per_rank", "equal", "tensors", "different")
    print(format_table(header, [[row[key] for key in header] for row in rows]))
    print(f"{sum(row['equal'] for row in rows)} of {len(rows)} equal, bit for bit; {len(left)} left")


if __name__ == "__main__":
    main()
