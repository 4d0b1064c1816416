"""The bound: every rank runs its block's forwards and backwards one after another, without a pipeline or a message.

What this takes longer than asked is the emulation's own (sleep overshoot, a little arithmetic and autograd after a
sleep, four processes on fewer cores), and no runtime can be faster.
"""

from __future__ import annotations

import gc
import json
import time

import torch
import torch.distributed as dist
from benchmarks.common import periods_ms
from benchmarks.runtime_overhead.emulated import BOUNDARY_FLOATS, EmulatedBlock, build_parser


def main() -> None:
    arguments = build_parser("Time the emulated blocks alone; run it under torchrun.").parse_args()
    dist.init_process_group("gloo")
    block = EmulatedBlock(arguments.forward_ms, arguments.backward_ms)
    hidden, gradient = torch.ones(1, BOUNDARY_FLOATS), torch.ones(1, BOUNDARY_FLOATS)
    gc.freeze()
    dist.barrier()
    stamps = []
    for _ in range(arguments.num_warmup_batches + arguments.num_batches):
        for _ in range(arguments.num_microbatches):
            block(hidden.requires_grad_()).backward(gradient)
            block.weight.grad = hidden.grad = None
        stamps.append(time.perf_counter())
    if dist.get_rank() == 0:
        print(json.dumps({"batch_ms": periods_ms(stamps[arguments.num_warmup_batches - 1 :])}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
