"""Contestant: torch's own `PipelineStage` and `Schedule1F1B`, half of the blocks on each of two ranks."""

from __future__ import annotations

import gc
import json
import time

import torch
import torch.distributed as dist
from benchmarks.common import periods_ms
from benchmarks.real_compute.blocks import LEARNING_RATE, NUM_BLOCKS, build_batch, build_blocks, build_parser
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B


def main() -> None:
    arguments = build_parser("Time torch's Schedule1F1B on transformer blocks; run it under torchrun.").parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    share = NUM_BLOCKS // num_ranks
    blocks = nn.Sequential(*build_blocks()[rank * share : (rank + 1) * share])
    stage = PipelineStage(blocks, rank, num_ranks, torch.device("cpu"))
    schedule = Schedule1F1B(stage, arguments.num_microbatches, loss_fn=nn.functional.mse_loss)
    optimizer = torch.optim.SGD(blocks.parameters(), lr=LEARNING_RATE)
    batch, targets = build_batch()
    inputs = (batch,) if rank == 0 else ()
    target = targets if rank == num_ranks - 1 else None

    gc.freeze()
    # Rank 0 is the last to finish a batch, so its stamps are one pipeline period apart.
    stamps: list[float] = []
    losses: list[torch.Tensor] = []
    for _ in range(arguments.num_warmup_batches + arguments.num_batches):
        optimizer.zero_grad()
        schedule.step(*inputs, target=target, losses=losses, return_outputs=False)
        optimizer.step()
        stamps.append(time.perf_counter())
    loss = torch.stack(losses).mean() if losses else torch.zeros(())
    dist.broadcast(loss, num_ranks - 1)
    if rank == 0:
        measured = periods_ms(stamps[arguments.num_warmup_batches - 1 :])
        print(json.dumps({"batch_ms": measured, "loss": loss.item()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
