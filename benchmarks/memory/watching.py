"""What it costs to keep the ledger: batches of the same run without and with a memory limit, in turn.

With a limit one batch of 32 is looked at closely; for comparison also all of them are.

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
from vpipe.runtime import memory_watch

_LOOK_AGAIN = memory_watch._LOOK_AGAIN
NUM_RANKS, NUM_MICROBATCHES, NUM_BATCHES, NUM_CLOSE = 2, 8, 16, 3
"""The first batches are looked at closely whether there is a limit or not: they are left out."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policies", default="keep", choices=["keep", "recompute", "swap"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "watching.json")
    arguments = parser.parse_args()
    surroundings = environment()
    times: dict[str, list[list[float]]] = {"without a limit": [], "with one": [], "all looked at closely": []}
    for _ in range(arguments.rounds):
        for name, runs in times.items():
            memory_watch._LOOK_AGAIN = 1 if "closely" in name else _LOOK_AGAIN
            runs.append(_batch_ms(arguments.policies, None if "without" in name else "16GiB"))
    middle = [[statistics.median(run) for run in runs] for runs in zip(*times.values(), strict=True)]
    costs = [[each / before - 1 for each in others] for before, *others in middle]
    rows = [
        [f"{before:.1f}", *(f"{each:.1f} ({cost:+.1%})" for each, cost in zip(others, own, strict=True))]
        for (before, *others), own in zip(middle, costs, strict=True)
    ]
    print(format_table([f"{name}, ms" for name in times], rows))
    medians = [round(statistics.median(each), 4) for each in zip(*costs, strict=True)]
    print("median costs " + ", ".join(f"{cost:+.1%}" for cost in medians))
    result = {"policies": arguments.policies, "batch_ms": times, "median_costs": medians}
    write_results(arguments.out, {"environment": surroundings, **result})


def _batch_ms(policy: str, limit: str | None) -> list[float]:
    tree: dict[str, Any] = base_config("bert", NUM_MICROBATCHES)
    tree["pipeline"] |= {"schedule": "1f1b", "num_ranks": NUM_RANKS}
    tree["train"]["iterations"] = NUM_BATCHES
    tree["plan"] = {"policies": [policy] * NUM_BLOCKS["bert"]} | ({} if limit is None else {"memory_limit": limit})
    return [round(time, 2) for time in run_config(build_config(tree))[0].batch_ms[NUM_CLOSE:]]


if __name__ == "__main__":
    main()
