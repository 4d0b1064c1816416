"""Contestant: VPipe, one emulated device per rank."""

from __future__ import annotations

import gc
import json
import time

import torch
from benchmarks.common import periods_ms
from benchmarks.runtime_overhead.emulated import (
    BOUNDARY_FLOATS,
    NUM_RANKS,
    EmulatedBlock,
    build_parser,
    mean_loss,
)

from vpipe.plan.plan import Plan
from vpipe.runtime.pipeline import Pipeline


def main() -> None:
    parser = build_parser("Time VPipe on emulated devices; run it under torchrun.")
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument(
        "--eager", type=int, default=2, help="asynchronous: warmup depth, as a multiple of the least one"
    )
    parser.add_argument("--macrobatch", action="store_true", help="asynchronous: one update per batch")
    arguments = parser.parse_args()
    depths = [arguments.eager * (NUM_RANKS - 1 - stage) for stage in range(NUM_RANKS)]
    batch = torch.ones(arguments.num_microbatches, BOUNDARY_FLOATS)
    num_batches = arguments.num_warmup_batches + arguments.num_batches
    with Pipeline(
        [EmulatedBlock(arguments.forward_ms, arguments.backward_ms) for _ in range(NUM_RANKS)],
        mean_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-6),
        plan=Plan(
            arguments.schedule,
            num_microbatches=arguments.num_microbatches,
            depths=depths if arguments.schedule == "pipedream" else None,
            macrobatch=arguments.macrobatch,
        ),
    ) as pipeline:
        gc.freeze()
        # Rank 0 is the last to finish a batch, so its stamps are one pipeline period apart. The last batch, in which an
        # asynchronous pipeline drains, is not measured.
        stamps = [time.perf_counter() for _ in pipeline.train([(batch, batch)] * (num_batches + 1))][:num_batches]
        if pipeline.rank == 0:
            print(json.dumps({"batch_ms": periods_ms(stamps[arguments.num_warmup_batches - 1 :])}))


if __name__ == "__main__":
    main()
