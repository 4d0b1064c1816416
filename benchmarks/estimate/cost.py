"""Measure what estimates cost: time from the command to its answer, and the most memory of any of its processes.

    .venv/bin/python -m benchmarks.estimate.cost [NUMBER...]

Runs all commands, or those of the given numbers, and writes benchmarks/estimate/results/cost.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import environment, format_table, write_results

OUT = Path(__file__).parent / "results" / "cost.json"
COMMANDS = (
    "--model gpt3-175b --ranks 64 --device a100-80gb",
    "--model gpt3-175b --ranks 64 --device a100-80gb --batch-size 64",
    "--model gpt3-175b --ranks 64 --device a100-80gb --no-swap",
    "--model gpt3-175b --ranks 8 --devices-per-rank 8 --schedule interleaved --stages-per-rank 3 --batch-size 64",
    "--model llama3-405b --ranks 16 --devices-per-rank 8 --device h100-80gb --link infiniband-ndr",
    "--model llama-70b --ranks 32 --device h100-80gb",
    "--model gpt2-xl --ranks 8 --device a100-40gb",
    "--model bert-large --ranks 4 --device v100-16gb --link ethernet-10g",
    "--model bert-large --ranks 4 --device v100-16gb --schedule auto",
    "--model configs/gpt_quickstart.yml --device rtx3090-24gb",
)


def measure(command: str) -> dict[str, Any]:
    """Run one `vpipe estimate` and return its time, its memory and what it found."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "vpipe", "estimate", *command.split(), "--format", "json"], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"vpipe estimate {command} ended with {status}")
    content = json.loads(output)
    found = content["estimate"]
    return {
        "command": command,
        "seconds": round(seconds, 1),
        "gib": round(usage.ru_maxrss / 2**20, 2),
        "schedule": f"{content['schedule']}, {content['num_microbatches']} x {content['microbatch_size']}",
        **{name: found[name] for name in ("step_s", "tokens_per_s", "utilisation", "recomputed_blocks")},
        "swapped_blocks": found["swapped_blocks"],
        "memory_gib": round(max(item["total"] for item in content["predicted"]["memory_bytes"]) / 2**30, 1),
    }


def main() -> None:
    numbers = [int(text) for text in sys.argv[1:]] or range(len(COMMANDS))
    known = json.loads(OUT.read_text())["runs"] if OUT.exists() else {}
    results = {"environment": environment()}
    for number in numbers:
        known[COMMANDS[number]] = measure(COMMANDS[number])
    results["runs"] = {command: known[command] for command in COMMANDS if command in known}
    rows = [
        [
            row["command"], row["seconds"], row["gib"], row["schedule"], f"{row['step_s']:.4g}",
            f"{row['tokens_per_s']:,.0f}", f"{row['utilisation']:.1%}", row["memory_gib"], row["recomputed_blocks"],
            row["swapped_blocks"],
        ]
        for row in results["runs"].values()
    ]  # fmt: skip
    header = [
        "vpipe estimate",
        "seconds",
        "GiB",
        "found",
        "s/step",
        "tokens/s",
        "MFU",
        "GiB/device",
        "recomputed",
        "swapped",
    ]
    print(format_table(header, rows))
    write_results(OUT, results)


if __name__ == "__main__":
    main()
