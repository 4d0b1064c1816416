"""Contestant: one process that runs the same microbatches one after another, on one or more threads."""

from __future__ import annotations

import json
import time

import torch
from benchmarks.common import periods_ms
from benchmarks.real_compute.blocks import LEARNING_RATE, build_batch, build_blocks, build_parser
from torch import nn


def main() -> None:
    parser = build_parser("Time plain PyTorch in one process.")
    parser.add_argument("--num-threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.num_threads)
    model = nn.Sequential(*build_blocks())
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    microbatches = [tensor.chunk(arguments.num_microbatches) for tensor in build_batch()]

    stamps = []
    for _ in range(arguments.num_warmup_batches + arguments.num_batches):
        optimizer.zero_grad()
        losses = []
        for inputs, targets in zip(*microbatches, strict=True):
            loss = nn.functional.mse_loss(model(inputs), targets)
            (loss / arguments.num_microbatches).backward()
            losses.append(loss.detach())
        optimizer.step()
        stamps.append(time.perf_counter())
    measured = periods_ms(stamps[arguments.num_warmup_batches - 1 :])
    print(json.dumps({"batch_ms": measured, "loss": torch.stack(losses).mean().item()}))


if __name__ == "__main__":
    main()
