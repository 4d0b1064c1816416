"""Measure what ranks hold for backwards, on real transformer blocks, in schedules made to hold less.

python -m benchmarks.families.memory [--ranks 4 8 16] [--out FILE]

Each block is one of BERT's (attention and feed-forward of linear layers, dropout on). All schedules train the same
blocks on the same batches: two blocks per rank, in two stages where the schedule has two. After every action each rank
counts the bytes of all tensors that are alive, less weights and their gradients, and the most it ever counted is what
it held: activations, messages, and what a split backward has noted.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import environment, format_table, write_results
from benchmarks.families.blocks import bert_blocks
from benchmarks.families.live_bytes import LiveBytes
from benchmarks.simulator.ranks import fork, free_port
from torch import nn

from vpipe.runtime.hooks import Hooks
from vpipe.runtime.pipeline import Pipeline
from vpipe.schedule.action import Action
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.registry import build_schedule, find_entry

BASELINE = "1f1b"
SCHEDULES = (BASELINE, "zb-v", "v-half", "v-min")
HIDDEN_SIZE, NUM_TOKENS, MICROBATCH_SIZE = 128, 128, 4


def measure(schedule: str, num_ranks: int) -> list[int]:
    """Train one batch of twice as many microbatches as ranks; return the most bytes that each rank held."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:

        def be_rank(rank: int) -> None:
            places = {"RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port, "LOCAL_RANK": rank}
            os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
            (Path(folder) / str(rank)).write_bytes(pickle.dumps(_train(schedule, num_ranks)))

        fork(num_ranks, be_rank)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(num_ranks)]


def _train(schedule: str, num_ranks: int) -> int:
    live, counts = LiveBytes(), [0]

    def count(action: Action, start_ns: int, end_ns: int) -> None:
        parameters = [parameter for item in pipeline.held.values() for parameter in item.weights.parameters]
        counts.append(live.count(without=[parameter.grad for parameter in parameters]))

    pipeline = Pipeline(
        bert_blocks(2 * num_ranks, HIDDEN_SIZE),
        nn.functional.mse_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        schedule=schedule,
        num_microbatches=2 * num_ranks,
        stages_per_rank=find_entry(schedule).default_stages_per_rank,
        hooks=Hooks(record=count),
    )
    shape = (2 * num_ranks * MICROBATCH_SIZE, NUM_TOKENS, HIDDEN_SIZE)
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with pipeline, live:
        pipeline.step(batch, batch)
    return max(counts)


def compare(num_ranks: int) -> dict[str, Any]:
    """Measure all schedules on so many ranks."""
    found = {}
    for name in SCHEDULES:
        held = measure(name, num_ranks)
        print(f"{num_ranks} ranks  {name:<8} {max(held) / 2**20:8.1f} MiB", flush=True)
        found[name] = {
            "held_bytes": held,
            "microbatches": max(peak_activations(build_schedule(name, num_ranks, 2 * num_ranks))),
        }
    return found


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    rows = []
    for ranks, found in results.items():
        base = found[BASELINE]
        for name, row in found.items():
            worst = max(row["held_bytes"])
            rows.append(
                [
                    ranks,
                    f"`{name}`",
                    f"{worst / 2**20:.1f}",
                    f"{worst / max(base['held_bytes']):.2f}",
                    f"{row['microbatches']:g}",
                    f"{row['microbatches'] / base['microbatches']:.2f}",
                ]
            )
    print(format_table(["ranks", "schedule", "held [MiB]", f"of `{BASELINE}`'s", "microbatches", "of its"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    arguments = parser.parse_args()
    results = (
        json.loads(arguments.out.read_text()) if arguments.out.exists() else {"environment": environment(), "ranks": {}}
    )
    for num_ranks in arguments.ranks:
        if str(num_ranks) not in results["ranks"]:
            results["ranks"][str(num_ranks)] = compare(num_ranks)
            write_results(arguments.out, results)
    show(results["ranks"])


if __name__ == "__main__":
    main()
