"""Contestant: torch's own `PipelineStage` and `Schedule1F1B`, one emulated device per rank."""

from __future__ import annotations

import gc
import json
import time

import torch
import torch.distributed as dist
from benchmarks.common import periods_ms
from benchmarks.runtime_overhead.emulated import BOUNDARY_FLOATS, EmulatedBlock, build_parser, mean_loss
from torch.distributed.pipelining import PipelineStage, Schedule1F1B


def main() -> None:
    arguments = build_parser("Time torch's Schedule1F1B on emulated devices; run it under torchrun.").parse_args()
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    block = EmulatedBlock(arguments.forward_ms, arguments.backward_ms)
    stage = PipelineStage(block, rank, num_ranks, torch.device("cpu"))
    schedule = Schedule1F1B(stage, arguments.num_microbatches, loss_fn=mean_loss)
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-6)
    batch = torch.ones(arguments.num_microbatches, BOUNDARY_FLOATS)
    inputs = (batch,) if rank == 0 else ()
    target = batch if rank == num_ranks - 1 else None

    gc.freeze()
    # Rank 0 is the last to finish a batch, so its stamps are one pipeline period apart.
    stamps = []
    for _ in range(arguments.num_warmup_batches + arguments.num_batches):
        optimizer.zero_grad()
        schedule.step(*inputs, target=target, return_outputs=False)
        optimizer.step()
        stamps.append(time.perf_counter())
    if rank == 0:
        print(json.dumps({"batch_ms": periods_ms(stamps[arguments.num_warmup_batches - 1 :])}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
