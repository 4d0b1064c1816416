"""What it costs to keep the ledger: batches of the same run without and with a memory limit, in turn.

python -m benchmarks.memory.watching [--rounds 3] [--policies keep] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import environment, format_table, write_results
from benchmarks.memory.configurations import NUM_BLOCKS, base_config
from benchmarks.memory.ranks import run_config

from vpipe.config import build_config

NUM_RANKS, NUM_MICROBATCHES, NUM_BATCHES, NUM_CLOSE = 2, 8, 16, 3
"""The first batches are looked at closely whether there is a limit or not: they are left out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policies", default="keep", choices=["keep", "recompute", "swap"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "watching.json")
    arguments = parser.parse_args()
    surroundings = environment()
    times: dict[str, list[list[float]]] = {"without": [], "with": []}
    for _ in range(arguments.rounds):
        for name, limit in (("without", None), ("with", "16GiB")):
            times[name].append(_batch_ms(arguments.policies, limit))
    middle = {name: [statistics.median(run) for run in runs] for name, runs in times.items()}
    pairs = list(zip(middle["without"], middle["with"], strict=True))
    costs = [after / before - 1 for before, after in pairs]
    rows = [
        [f"{before:.1f}", f"{after:.1f}", f"{cost:+.1%}"] for (before, after), cost in zip(pairs, costs, strict=True)
    ]
    print(format_table(["without a limit, ms", "with one, ms", "cost"], rows))
    print(f"median cost {statistics.median(costs):+.1%}")
    result = {"policies": arguments.policies, "batch_ms": times, "costs": [round(cost, 4) for cost in costs]}
    write_results(arguments.out, {"environment": surroundings, **result})


def _batch_ms(policy: str, limit: str | None) -> list[float]:
    tree: dict[str, Any] = base_config("bert", NUM_MICROBATCHES)
    tree["pipeline"] |= {"schedule": "1f1b", "num_ranks": NUM_RANKS}
    tree["train"]["iterations"] = NUM_BATCHES
    tree["plan"] = {"policies": [policy] * NUM_BLOCKS["bert"]} | ({} if limit is None else {"memory_limit": limit})
    return [round(time, 2) for time in run_config(build_config(tree))[0].batch_ms[NUM_CLOSE:]]


if __name__ == "__main__":
    main()
