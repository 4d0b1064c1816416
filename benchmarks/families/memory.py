"""Measure what ranks hold for backwards, on real transformer blocks, in schedules made to hold less.

python -m benchmarks.families.memory [--ranks 4 8 16] [--schedules NAME...] [--out FILE]

Each block is one of BERT's (attention and feed-forward of linear layers, dropout on). All schedules train the same
blocks on the same batches: four blocks per rank, in two stages where the schedule has two. After every action each rank
counts the bytes of all tensors that are alive, less weights and their gradients: activations, what was received, and
what a split backward has noted. Messages that were sent are counted apart. The figure is the most that it ever counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import environment, format_table, write_results
from benchmarks.families.blocks import bert_blocks
from benchmarks.families.live_bytes import LiveBytes
from benchmarks.simulator.ranks import fork, free_port
from torch import Tensor, nn

from vpipe.plan.plan import Plan
from vpipe.runtime.hooks import Hooks
from vpipe.runtime.pipeline import Pipeline
from vpipe.schedule.action import Action
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.registry import build_schedule, find_entry

SENT = "sent"
MIB = 2**20
BASELINE = "1f1b"
SCHEDULES = (BASELINE, "zb-v", "v-half", "v-min")
BLOCKS_PER_RANK = 4
HIDDEN_SIZE, NUM_TOKENS, MICROBATCH_SIZE = 128, 64, 4


def measure(schedule: str, num_ranks: int) -> list[tuple[int, int]]:
    """Train one batch of twice as many microbatches as ranks; return the most bytes that each rank held, and sent."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:

        def be_rank(rank: int) -> None:
            places = {"RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port, "LOCAL_RANK": rank}
            os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
            (Path(folder) / str(rank)).write_bytes(pickle.dumps(_train(schedule, num_ranks)))

        fork(num_ranks, be_rank)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(num_ranks)]


def _train(schedule: str, num_ranks: int) -> tuple[int, int]:
    live, held, sent = LiveBytes(), [0], [0]

    def count(action: Action, start_ns: int, end_ns: int) -> None:
        parameters = [parameter for item in pipeline.held.values() for parameter in item.weights.parameters]
        held.append(live.count(without=[parameter.grad for parameter in parameters]))
        sent.append(live.count(SENT))

    pipeline = Pipeline(
        bert_blocks(BLOCKS_PER_RANK * num_ranks, HIDDEN_SIZE),
        nn.functional.mse_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        plan=Plan(
            schedule, num_microbatches=2 * num_ranks, stages_per_rank=find_entry(schedule).default_stages_per_rank
        ),
        hooks=Hooks(record=count),
    )
    send = pipeline.transport.send

    def labelled_send(action: Action, values: Mapping[str, Tensor]) -> None:
        with live.label(SENT):
            send(action, values)

    pipeline.transport.send = labelled_send  # type: ignore[method-assign]
    shape = (2 * num_ranks * MICROBATCH_SIZE, NUM_TOKENS, HIDDEN_SIZE)
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with pipeline, live:
        pipeline.step(batch, batch)
    return max(held), max(sent)


def compare(name: str, num_ranks: int) -> dict[str, Any]:
    """Measure one schedule on so many ranks."""
    ranks = measure(name, num_ranks)
    return {
        "held_bytes": [held for held, _ in ranks],
        "sent_bytes": [sent for _, sent in ranks],
        "microbatches": max(peak_activations(build_schedule(name, num_ranks, 2 * num_ranks))),
    }


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
                    f"{worst / MIB:.1f}",
                    f"{worst / max(base['held_bytes']):.2f}",
                    f"{row['microbatches']:g}",
                    f"{row['microbatches'] / base['microbatches']:.2f}",
                    f"{max(row['sent_bytes']) / MIB:.1f}",
                ]
            )
    header = ["ranks", "schedule", "held [MiB]", f"of `{BASELINE}`", "microbatches", f"of `{BASELINE}`", "sent [MiB]"]
    print(format_table(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    arguments = parser.parse_args()
    results = (
        json.loads(arguments.out.read_text()) if arguments.out.exists() else {"environment": environment(), "ranks": {}}
    )
    for num_ranks, name in itertools.product(arguments.ranks, arguments.schedules):
        found = results["ranks"].setdefault(str(num_ranks), {})
        if name not in found:
            found[name] = compare(name, num_ranks)
            write_results(arguments.out, results)
    show(results["ranks"])


if __name__ == "__main__":
    main()
