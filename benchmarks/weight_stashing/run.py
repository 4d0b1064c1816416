"""Measure what weight versions cost: the memory of every rank, in sets of its parameters.

python -m benchmarks.weight_stashing.run [--num-rounds 3] [--out FILE]
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import (
    Contestant,
    environment,
    format_table,
    measure,
    parse_run,
    write_results,
)

HERE = "benchmarks.weight_stashing.stash_memory"
CONTESTANTS = (
    Contestant("1F1B", HERE, ("--schedule", "1f1b"), num_ranks=4),
    Contestant("PipeDream", HERE, ("--schedule", "pipedream"), num_ranks=4),
    Contestant("PipeDream-2BW", HERE, ("--schedule", "pipedream", "--macrobatch"), num_ranks=4),
)


def sets_measured(reports: list[dict[str, Any]], rank: int) -> float:
    """Return the memory that a rank held, counted in sets of its parameters: the median of the rounds."""
    held = [report["ranks"][rank] for report in reports]
    return float(statistics.median(each["held_bytes"] / each["parameter_bytes"] for each in held))


def main() -> None:
    default_out = Path(__file__).parent / "results" / "weight_stashing.json"
    contestants, num_rounds, out = parse_run(__doc__, CONTESTANTS, default_out)
    reports = {item.name: [measure(item, {}) for _ in range(num_rounds)] for item in contestants}
    rows, results = [], []
    for item in contestants:
        for rank in range(item.num_ranks):
            versions = reports[item.name][0]["ranks"][rank]["parameter_sets"]
            measured = sets_measured(reports[item.name], rank)
            error = measured / versions - 1
            results.append({"name": item.name, "rank": rank, "versions": versions, "measured": round(measured, 4)})
            rows.append([item.name, rank, versions, f"{measured:.3f}", f"{error:+.1%}"])
    write_results(out, {"environment": environment(), "results": results, "reports": reports})
    print(format_table(["schedule", "rank", "versions", "parameter sets measured", "error"], rows))


if __name__ == "__main__":
    main()
