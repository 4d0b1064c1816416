"""Run every configuration with the smallest limits that its prediction allows, and see whether they are kept.

python -m benchmarks.memory.kept [--only WORDS]
"""

from __future__ import annotations

import argparse

from benchmarks.memory.configurations import CONFIGURATIONS, Configuration
from benchmarks.memory.ranks import run_config
from benchmarks.memory.run import PROFILES, predict

from vpipe.plan.limits import needed_limit
from vpipe.plan.profile import read_profile

NUM_BATCHES = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the configurations whose name has these words")
    arguments = parser.parse_args()
    for configuration in CONFIGURATIONS:
        if all(word in configuration.name for word in arguments.only.split()):
            print(f"{_outcome(configuration)}  {configuration.name}", flush=True)


def _outcome(configuration: Configuration) -> str:
    profile = read_profile(PROFILES / f"{configuration.model}.json")
    limits = [needed_limit(memory.most) for memory in predict(configuration, profile)]
    config = configuration.config()
    plan = config.plan.model_copy(update={"memory_limit": limits})
    train = config.train.model_copy(update={"iterations": NUM_BATCHES})
    try:
        runs = run_config(config.model_copy(update={"plan": plan, "train": train}))
    except RuntimeError:
        return "ended by its limit"
    return "kept, by " + " ".join(f"{1 - run.peak_bytes / limit:.1%}" for run, limit in zip(runs, limits, strict=True))


if __name__ == "__main__":
    main()
