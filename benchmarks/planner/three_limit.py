"""GPipe, PipeDream and VPipe under one memory limit, at which PipeDream without recomputation does not fit.

python -m benchmarks.planner.three_limit [--model emulated|bert] [--num-rounds 3] [--most-seconds 170] [--out FILE]

All three train the same chain with the same batches on four ranks, and run as far as they can: GPipe cuts by block
count and recomputes everything; PipeDream cuts by block count, keeps everything, and takes the largest microbatches
that fit; VPipe has PipeDream's schedule and plans the rest. `emulated` has devices that sleep; `bert` is the model of
`configs/narrow_4*.yml`, whose four ranks share the cores of this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmarks.common import ROOT, environment, format_table, spread, write_results
from benchmarks.families.quiet import quietly
from benchmarks.planner.ranks import measure_profile, train_configs

from vpipe.config import RunConfig, build_config
from vpipe.config.planning.planned import build_request, decide
from vpipe.errors import PlanError
from vpipe.plan.policy import Policy
from vpipe.planner.profile.profile import Profile
from vpipe.planner.search.search import judge_partition
from vpipe.words.units import format_bytes

NUM_MICROBATCHES, MICROBATCH_SIZE = 8, 4
SHARES = {"emulated": 0.72, "bert": 0.6}
"""The limit, as a share of what PipeDream needs: about as low as PipeDream fits with the smallest microbatches."""
OPTIONS: dict[str, Any] = {"microbatch_size": MICROBATCH_SIZE}
# A BERT layer holds about 22 times its input, half of that in each of its two blocks (Korthikanti et al., 2022), and
# in microbatches of four samples as much as 20 thousandths of its parameters beside 64 KiB for the input.
EMULATED: dict[str, Any] = {
    "model": {
        "type": "custom",
        "entry": "benchmarks.planner.chains:chain",
        "options": {"name": "heavy head", "parameter_scale": 0.02, "held_values": 10, **OPTIONS},
    },
    "data": {"type": "custom", "entry": "benchmarks.planner.chains:data", "options": OPTIONS},
    "optimizer": {"name": "adamw", "learning_rate": 1e-6},
}
SCHEDULES = {"GPipe": "gpipe", "PipeDream": "pipedream", "VPipe": "pipedream"}


def model_of(name: str) -> dict[str, Any]:
    """Return the sections that say what is trained."""
    if name == "emulated":
        return EMULATED
    tree = yaml.safe_load((ROOT / "configs" / "narrow_4vpipe.yml").read_text())
    return {"model": tree["model"], "data": {"synthetic_data": True}, "optimizer": tree["optimizer"]}


def config_of(model: str, name: str, num_microbatches: int, num_blocks: int = 0, **plan: object) -> RunConfig:
    """Return a contestant's run; of `num_blocks` blocks that keep their activations, or do what the planner says."""
    pipeline = {"schedule": SCHEDULES[name], "num_ranks": 4, "num_microbatches": num_microbatches}
    if name == "GPipe":
        pipeline["recompute"] = "always"
    if name == "PipeDream":
        plan["policies"] = [Policy.KEEP.value] * num_blocks
    if name != "VPipe":
        plan["swap_versions"] = False
    return build_config(
        {
            **model_of(model),
            "pipeline": pipeline,
            "plan": {"partition": "auto" if name == "VPipe" else "uniform", **plan},
            "train": {
                "batch_size": NUM_MICROBATCHES * MICROBATCH_SIZE,
                "iterations": 10,
                "eval_batches": 0,
                "save_model": False,
            },
            "launch": {"device": "cpu", "threads_per_rank": 1},
        }
    )


def largest_that_fits(model: str, name: str, profiles: Mapping[int, Profile], limit: int) -> RunConfig:
    """Return the contestant's run with the largest microbatches that keep the limit."""
    for num_microbatches, profile in profiles.items():
        config = config_of(model, name, num_microbatches, profile.num_blocks, memory_limit=limit)
        try:
            decide(config, profile)
        except PlanError:
            continue
        return config
    raise PlanError(f"{name} does not fit {limit} bytes with any of {list(profiles)} microbatches")


def begin(model: str, end: float) -> dict[str, Any] | None:
    """Profile for microbatches of several sizes, choose the limit, and see how each contestant keeps it."""
    counts = [NUM_MICROBATCHES, 2 * NUM_MICROBATCHES, 4 * NUM_MICROBATCHES]
    found = [quietly(partial(measure_profile, config_of(model, "VPipe", count)), end) for count in counts]
    profiles = {count: profile for count, profile in zip(counts, found, strict=True) if profile is not None}
    if len(profiles) < len(counts):
        return None
    profile = profiles[NUM_MICROBATCHES]
    free = config_of(model, "PipeDream", NUM_MICROBATCHES, profile.num_blocks)
    needed = judge_partition(build_request(free, profile), "uniform", [Policy.KEEP] * profile.num_blocks)
    most = max(memory.total for memory in needed.memory)
    limit = int(SHARES[model] * most)
    contestants = {}
    for name in SCHEDULES:
        config = largest_that_fits(model, name, profiles, limit)
        chosen = decide(config, profiles[config.num_microbatches]).chosen
        contestants[name] = {
            "num_microbatches": config.num_microbatches,
            "partition": list(chosen.partition),
            "policies": Counter(policy.value for policy in chosen.policies),
            "predicted_ms": round(chosen.step_ms, 2),
            "predicted_bytes": max(memory.total for memory in chosen.memory),
            "setting": chosen.setting.describe(),
            "lost_ms": [round(time_, 2) for time_ in chosen.lost_ms],
            "rounds_ms": [],
            "measured_bytes": 0,
        }
    return {
        "limit": limit,
        "pipedream_needs": most,
        "host_share": profile.host_share,
        "contestants": contestants,
    }


def measure(model: str, row: dict[str, Any], num_rounds: int, end: float) -> bool:
    """Run all in turn, round after round; return whether all rounds were run."""
    contestants = row["contestants"]
    num_blocks = sum(contestants["GPipe"]["partition"])
    configs = {
        name: config_of(model, name, one["num_microbatches"], num_blocks, memory_limit=row["limit"])
        for name, one in contestants.items()
    }
    for number in range(num_rounds):
        with tempfile.TemporaryDirectory() as folder:
            summaries = quietly(partial(train_configs, configs, Path(folder)), end)
        if summaries is None:
            return number > 0
        for name, summary in summaries.items():
            contestants[name]["rounds_ms"].append(round(summary["iteration_ms"], 2))
            contestants[name]["measured_bytes"] = max(summary["peak_ledger_bytes"])
        print({name: one["rounds_ms"][-1] for name, one in contestants.items()}, flush=True)
    return True


def show(row: dict[str, Any]) -> None:
    """Print the table."""
    lines = []
    for name, one in row["contestants"].items():
        step = spread(one["rounds_ms"])
        rates = sorted(1e3 * NUM_MICROBATCHES * MICROBATCH_SIZE / each for each in one["rounds_ms"])
        lines.append(
            [
                name,
                f"{one['num_microbatches']} x {NUM_MICROBATCHES * MICROBATCH_SIZE // one['num_microbatches']}",
                " ".join(map(str, one["partition"])),
                ", ".join(f"{count} {policy}" for policy, count in one["policies"].items()),
                f"{rates[len(rates) // 2]:.1f} ({rates[0]:.1f} to {rates[-1]:.1f})",
                f"{one['predicted_ms'] / step['median'] - 1:+.1%}",
                format_bytes(one["measured_bytes"]),
            ]
        )
    print(f"limit {format_bytes(row['limit'])}; PipeDream needs {format_bytes(row['pipedream_needs'])}")
    header = ["contestant", "microbatches", "blocks per stage", "blocks that", "samples/s", "prediction", "peak"]
    print(format_table(header, lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["emulated", "bert"], default="emulated")
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--most-seconds", type=float, default=170.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "three_limit.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + arguments.most_seconds
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        surroundings = environment()
        row = begin(arguments.model, end)
        if row is None or not measure(arguments.model, row, arguments.num_rounds, end):
            print("no time left: run it again when the machine is quiet")
            return
    results[arguments.model] = {"environment": surroundings, **row}
    write_results(arguments.out, results)
    show(row)


if __name__ == "__main__":
    main()
