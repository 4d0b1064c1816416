"""Run every configuration with the smallest limits that its prediction allows, and see whether they are kept.

python -m benchmarks.memory.kept [--only WORDS] [--out FILE]

What a file of results has already is not run again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.common import environment, write_results
from benchmarks.memory.configurations import CONFIGURATIONS, Configuration
from benchmarks.memory.ranks import run_config
from benchmarks.memory.run import PROFILES, predict

from vpipe.planner.profile.profile import read_profile
from vpipe.planner.search.limits import needed_limit

NUM_BATCHES = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the configurations whose name has these words")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kept.json")
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results = {"environment": environment(), "left": {}} | results
    for configuration in CONFIGURATIONS:
        name, left = configuration.name, results["left"]
        if name not in left and all(word in name for word in arguments.only.split()):
            left[name] = shares_left(configuration)
            write_results(arguments.out, results)
        if name in left:
            print(f"{_words(left[name])}  {name}", flush=True)


def shares_left(configuration: Configuration) -> list[float] | None:
    """Return what share of its limit each rank left; None where one was ended by it."""
    profile = read_profile(PROFILES / f"{configuration.model}.json")
    limits = [needed_limit(memory.most) for memory in predict(configuration, profile)]
    config = configuration.config()
    plan = config.plan.model_copy(update={"memory_limit": limits})
    train = config.train.model_copy(update={"iterations": NUM_BATCHES})
    try:
        runs = run_config(config.model_copy(update={"plan": plan, "train": train}))
    except RuntimeError:
        return None
    return [round(1 - run.peak_bytes / limit, 4) for run, limit in zip(runs, limits, strict=True)]


def _words(left: list[float] | None) -> str:
    return "ended by its limit" if left is None else "kept, by " + " ".join(f"{share:.1%}" for share in left)


if __name__ == "__main__":
    main()
