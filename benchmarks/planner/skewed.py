"""Planned runs against naive cuts, on four emulated devices: five chains whose blocks are not alike.

python -m benchmarks.planner.skewed [--only CHAIN...] [--num-rounds 3] [--most-seconds 150] [--out FILE]

Each chain is profiled, planned and predicted; then all contestants run in turn, round after round. The results file is
the state: a run that is cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import environment, format_table, write_results
from benchmarks.families.quiet import quietly
from benchmarks.planner.balance import balance_by_time
from benchmarks.planner.chains import CHAINS, SLOW_RANK, SLOWDOWN, WIDTH, chain, ideal_ms
from benchmarks.planner.contest import PLANNED, measure_rounds, summarise
from benchmarks.planner.ranks import measure_profile

from vpipe.config import RunConfig, build_config
from vpipe.config.planning.planned import build_request, decide
from vpipe.plan.partition import Partition
from vpipe.planner.search.search import judge_partition

NUM_RANKS, NUM_MICROBATCHES = 4, 16


def config_of(name: str, partition: object) -> RunConfig:
    """Return the run of a chain with a partition."""
    return build_config(
        {
            "model": {"type": "custom", "entry": "benchmarks.planner.chains:chain", "options": {"name": name}},
            "data": {"type": "custom", "entry": "benchmarks.planner.chains:data"},
            "pipeline": {"schedule": "1f1b", "num_ranks": NUM_RANKS, "num_microbatches": NUM_MICROBATCHES},
            "plan": {"partition": partition},
            "optimizer": {"name": "sgd", "learning_rate": 1e-6},
            "train": {"batch_size": NUM_MICROBATCHES, "iterations": 12, "save_model": False},
            "launch": {"device": "cpu", "threads_per_rank": 1},
        }
    )


def begin(name: str, end: float) -> dict[str, Any] | None:
    """Profile and plan a chain; return the contestants with their predictions, before anything has run."""
    config = config_of(name, "auto")
    profile = quietly(partial(measure_profile, config), end)
    if profile is None:
        return None
    model = chain(name)
    cuts = {
        "uniform": Partition.uniform(len(model), NUM_RANKS),
        "parameters": Partition.by_weight(model.trainable_sizes(), NUM_RANKS),
        "balance_by_time": balance_by_time(model, NUM_RANKS, torch.ones(1, WIDTH)),
    }
    decision = decide(config, profile)
    request = replace(build_request(config_of(name, "uniform"), profile), is_eager=False)
    naive = {each: judge_partition(request, list(cut)).step_ms for each, cut in cuts.items()}
    speeds = [1 / SLOWDOWN if name == "slow device" and rank == SLOW_RANK else 1.0 for rank in range(NUM_RANKS)]
    return {
        "ideal_ms": round(NUM_MICROBATCHES * ideal_ms(CHAINS[name], speeds), 2),
        "rank_speeds": [round(speed, 3) for speed in profile.rank_speeds],
        "lower_bound_ms": round(decision.found.lower_bound_ms, 2) if decision.found else None,
        "depths": decision.plan.depths,
        "contestants": {
            each: {"partition": list(cut), "predicted_ms": round(predicted, 2), "rounds_ms": []}
            for each, cut, predicted in (
                *((each, cut, naive[each]) for each, cut in cuts.items()),
                (PLANNED, decision.chosen.partition, decision.chosen.step_ms),
            )
        },
    }


def _configs(name: str, contestants: dict[str, Any]) -> dict[str, RunConfig]:
    return {each: config_of(name, "auto" if each == PLANNED else one["partition"]) for each, one in contestants.items()}


def show(chains: dict[str, Any]) -> None:
    """Print the tables."""
    rows, errors = [], []
    for name, row in chains.items():
        if "summary" not in row:
            continue
        found = row["summary"]
        for each, one in row["contestants"].items():
            error = found["prediction_error"][each]
            words = ["", ""] if error is None else [f"{one['predicted_ms']:.1f}", f"{error:+.1%}"]
            over = "" if each == PLANNED else f"{found['speed_over'][each]['median']:.2f}"
            cut = " ".join(map(str, one["partition"]))
            measured = f"{found['measured_ms'][each]:.1f}"
            rows.append([name, each, cut, words[0], measured, words[1], over])
        best = found["speed_over"][found["best_naive"]]
        errors.append([name, found["best_naive"], f"{best['median']:.2f} ({best['min']:.2f} to {best['max']:.2f})"])
    header = ["chain", "cut", "blocks per stage", "predicted ms", "measured ms", "error", "planned is so much faster"]
    print(format_table(header, rows), "\n")
    print(format_table(["chain", "best naive cut", "planned over it"], errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CHAINS, default=list(CHAINS), metavar="CHAIN")
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--most-seconds", type=float, default=150.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "skewed.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + arguments.most_seconds
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"chains": {}}
    results.setdefault("environment", environment())
    with tempfile.TemporaryDirectory() as cache:
        # What earlier calls measured on this machine is no part of this one.
        os.environ["XDG_CACHE_HOME"] = cache
        for name in arguments.only:
            if "summary" in results["chains"].get(name, {}):
                continue
            row = begin(name, end)
            if row is None or not measure_rounds(
                name, row["contestants"], _configs(name, row["contestants"]), arguments.num_rounds, end
            ):
                print(f"{name}: no time left; run it again")
                break
            results["chains"][name] = {**row, "summary": summarise(row["contestants"])}
            write_results(arguments.out, results)
    show(results["chains"])


if __name__ == "__main__":
    main()
