"""Contestant: VPipe with stages of one big linear layer each; prints what every rank holds right after its updates.

At that moment there are no gradients, so what is resident above the empty process is the weights, and activations of
one row, which are nothing beside them.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vpipe.plan.plan import Plan
from vpipe.runtime.pipeline import Pipeline

WIDTH = 8192
NUM_RANKS = 4


def resident_bytes() -> int:
    """Return this process's resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def first_value(output: Tensor, target: Tensor) -> Tensor:
    """Return a loss that needs no memory of its own."""
    return output.mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedule", default="pipedream")
    parser.add_argument("--macrobatch", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # The first group and the first optimizer load code, whose memory is not the weights'.
    dist.init_process_group("gloo")
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    empty_bytes = resident_bytes()
    with torch.device("meta"):
        layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(NUM_RANKS)]
    with Pipeline(
        layers,
        first_value,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        plan=Plan(arguments.schedule, num_microbatches=8, macrobatch=arguments.macrobatch),
    ) as pipeline:
        batch = torch.ones(8, WIDTH)
        held_bytes = [resident_bytes() - empty_bytes for _ in pipeline.train([(batch, batch)] * 4)]
        (held,) = pipeline.held.values()
        mine = {
            "parameter_bytes": sum(item.nbytes for item in held.weights.parameters),
            "parameter_sets": held.weights.num_sets,
            "held_bytes": max(held_bytes[:-1]),
        }
        everyone: list[dict[str, int]] = [{} for _ in range(NUM_RANKS)]
        dist.all_gather_object(everyone, mine)
        if pipeline.rank == 0:
            print(json.dumps({"ranks": everyone}))
    # torch's threads may still drop that, for which they need the interpreter, which must not end before.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
