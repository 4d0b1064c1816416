"""A BERT with its heavy output matrix on two ranks that compute: planned against naive cuts.

python -m benchmarks.planner.real [--num-rounds 3] [--most-seconds 170] [--out FILE]

24 narrow layers (width 128) and the matrix over 30,522 words, synthetic text. Profiled and predicted first; then all
contestants run in turn, round after round. The results file is the state: a run that is cut short goes on where it
stopped.
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
from benchmarks.planner.contest import PLANNED, measure_rounds, summarise
from benchmarks.planner.ranks import measure_profile

from vpipe.config import RunConfig, build_config
from vpipe.config.planning.planned import build_request, decide
from vpipe.plan.partition import Partition
from vpipe.planner.search.search import judge_partition
from vpipe.workload.setup import build_setup

NUM_RANKS, NUM_MICROBATCHES, MICROBATCH_SIZE = 2, 8, 2


def config_of(partition: object) -> RunConfig:
    """Return the run with a partition."""
    return build_config(
        {
            "model": {"type": "bert", "num_layers": 24, "hidden_size": 128, "max_position_embeddings": 64},
            "data": {"synthetic_data": True, "sequence_length": 64},
            "pipeline": {"schedule": "1f1b", "num_ranks": NUM_RANKS, "num_microbatches": NUM_MICROBATCHES},
            "plan": {"partition": partition},
            "optimizer": {"name": "adamw", "learning_rate": 1e-4},
            "train": {
                "batch_size": NUM_MICROBATCHES * MICROBATCH_SIZE,
                "iterations": 12,
                "eval_batches": 0,
                "save_model": False,
            },
            "launch": {"device": "cpu", "threads_per_rank": 1},
        }
    )


def begin(end: float) -> dict[str, Any] | None:
    """Profile and plan; return the contestants with their predictions, before anything has run."""
    config = config_of("auto")
    profile = quietly(partial(measure_profile, config), end)
    if profile is None:
        return None
    model = build_setup(config).chain
    request = replace(build_request(config_of("uniform"), profile), is_eager=False)
    chosen = decide(config, profile).chosen
    cuts = [Partition.uniform(len(model), NUM_RANKS), Partition.by_weight(model.trainable_sizes(), NUM_RANKS)]
    naive = [judge_partition(request, cut) for cut in cuts]
    named = zip(("uniform", "parameters", PLANNED), (*naive, chosen), strict=True)
    head = profile.sizes[0].blocks[-1]
    return {
        "profile": json.loads(profile.to_json()),
        "head_ms": round(head.forward_ms + head.backward_ms, 2),
        "contestants": {
            name: {
                "partition": list(each.partition),
                "predicted_ms": round(each.step_ms, 2),
                "stage_ms": [round(time_, 2) for time_ in each.stage_ms],
                "rounds_ms": [],
            }
            for name, each in named
        },
    }


def show(row: dict[str, Any]) -> None:
    """Print the table."""
    found = row["summary"]
    rows = []
    for name, one in row["contestants"].items():
        measured = found["measured_ms"][name]
        rate = 1e3 * NUM_MICROBATCHES * MICROBATCH_SIZE / measured
        over = "" if name == PLANNED else f"{found['speed_over'][name]['median']:.2f}"
        error = f"{found['prediction_error'][name]:+.1%}"
        cut = " ".join(map(str, one["partition"]))
        rows.append([name, cut, f"{rate:.1f}", f"{one['predicted_ms']:.0f}", f"{measured:.0f}", error, over])
    header = ["cut", "blocks", "samples/s", "predicted ms", "measured ms", "error", "planned is so much faster"]
    print(format_table(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rounds", type=int, default=3)
    parser.add_argument("--most-seconds", type=float, default=170.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "real.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + arguments.most_seconds
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        surroundings = environment()
        row = begin(end)
        configs = row and {
            name: config_of("auto" if name == PLANNED else one["partition"]) for name, one in row["contestants"].items()
        }
        if not row or not configs or not measure_rounds("BERT", row["contestants"], configs, arguments.num_rounds, end):
            print("no time left: run it again when the machine is quiet")
            return
    row["summary"] = summarise(row["contestants"])
    write_results(arguments.out, {"environment": surroundings, **row})
    show(row)


if __name__ == "__main__":
    main()
