"""Contestant: VPipe, half of the blocks on each of two ranks."""

from __future__ import annotations

import gc
import json
import time

import torch
from benchmarks.common import periods_ms
from benchmarks.real_compute.blocks import LEARNING_RATE, NUM_BLOCKS, build_batch, build_blocks, build_parser
from torch import nn

from vpipe.plan.plan import Plan
from vpipe.runtime.pipeline import Pipeline


def main() -> None:
    parser = build_parser("Time VPipe on transformer blocks; run it under torchrun.")
    parser.add_argument("--schedule", default="1f1b")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    num_batches = arguments.num_warmup_batches + arguments.num_batches
    with Pipeline(
        build_blocks(),
        nn.functional.mse_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=LEARNING_RATE),
        plan=Plan(
            arguments.schedule,
            num_microbatches=arguments.num_microbatches,
            partition=[NUM_BLOCKS // 2, NUM_BLOCKS // 2],
        ),
    ) as pipeline:
        gc.freeze()
        stamps, losses = [], []
        for result in pipeline.train([build_batch()] * (num_batches + 1)):
            stamps.append(time.perf_counter())
            losses.append(result.loss)
        # The last batch, in which an asynchronous pipeline drains, is not measured.
        if pipeline.rank == 0:
            measured = periods_ms(stamps[arguments.num_warmup_batches - 1 : num_batches])
            print(json.dumps({"batch_ms": measured, "loss": losses[num_batches - 1]}))


if __name__ == "__main__":
    main()
