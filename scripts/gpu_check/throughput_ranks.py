"""A rank that trains the same blocks by VPipe's 1F1B and by torch's, in turn, and times both.

``torchrun --nproc-per-node 2 -m gpu_check.throughput_ranks cuda:0 gloo`` prints what it measured as JSON objects; with
``cuda nccl`` each rank has a device of its own.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import vpipe
from gpu_check.blocks import HOLDING, TRIED, Size, cross_entropy, sgd, wait_for

__all__: list[str] = []

_NUM_WARMUP, _NUM_ROUNDS, _NUM_BATCHES = 3, 5, 4

Step = Callable[[], float]


class Staged(nn.Module):
    """Blocks on a device whose neighbours talk through host memory: gloo sends nothing from a GPU's."""

    def __init__(self, blocks: nn.Module, device: torch.device, *, is_last: bool) -> None:
        super().__init__()
        self.blocks, self._device, self._is_last = blocks, device, is_last

    def forward(self, value: Tensor) -> Tensor:
        """Return what the blocks make of `value`, in host memory unless the loss is next."""
        result: Tensor = self.blocks(value.to(self._device))
        return result if self._is_last else result.cpu()


def _vpipe_step(size: Size, world: vpipe.World) -> Step:
    """Return what trains one batch by VPipe."""
    pipeline = vpipe.Pipeline(
        size.build_blocks(dropout=0.0),
        cross_entropy,
        plan=vpipe.Plan("1f1b", num_microbatches=size.num_microbatches, partition=_halves(size)),
        optimizer=sgd,
        world=world,
    )
    batch = size.build_batch()
    return lambda: pipeline.step(*batch).loss


def _torch_step(size: Size, world: vpipe.World) -> Step:
    """Return what trains one batch by torch's 1F1B; the loss is known on the last rank."""
    rank, device = dist.get_rank(), world.device
    is_last, first = rank == 1, _halves(size)[0]
    own = size.build_blocks(dropout=0.0)
    blocks: nn.Module = nn.Sequential(*(own[first:] if is_last else own[:first])).to(device)
    staged = device.type == "cuda" and dist.get_backend() == "gloo"
    wire = torch.device("cpu") if staged else device
    module = Staged(blocks, device, is_last=is_last) if staged else blocks
    inputs_like, outputs_like = _examples(size, blocks, is_last, wire, device)
    stage = PipelineStage(module, rank, 2, wire, inputs_like, outputs_like)
    schedule = Schedule1F1B(stage, size.num_microbatches, loss_fn=cross_entropy)
    optimizer = sgd(blocks.parameters())
    ids, labels = size.build_batch()

    def step() -> float:
        optimizer.zero_grad()
        losses: list[Tensor] = []
        inputs = () if is_last else (ids.to(wire),)
        schedule.step(*inputs, target=labels.to(device) if is_last else None, losses=losses, return_outputs=False)
        optimizer.step()
        return float(torch.stack(losses).mean().detach()) if losses else 0.0

    return step


def _examples(
    size: Size, blocks: nn.Module, is_last: bool, wire: torch.device, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return tensors like a microbatch's inputs and outputs: by itself torch runs the blocks on the wire's device."""
    rows = size.batch // size.num_microbatches
    hidden = torch.empty(rows, size.tokens, size.hidden, device=wire)
    if not is_last:
        return size.build_batch()[0][:rows].to(wire), hidden.requires_grad_()
    with torch.no_grad():
        output = blocks(hidden.to(device).zero_())
    return hidden.requires_grad_(), output.requires_grad_()


def _halves(size: Size) -> list[int]:
    first = size.num_blocks // 2
    return [first, size.num_blocks - first]


def _measure(step: Step, wait: Callable[[], None], count: int) -> tuple[list[float], float]:
    """Train `count` batches; return the milliseconds of each and the last loss."""
    dist.barrier()
    batch_ms, loss = [], 0.0
    for _ in range(count):
        start = time.perf_counter()
        loss = step()
        wait()
        batch_ms.append((time.perf_counter() - start) * 1e3)
    return batch_ms, loss


def main() -> None:
    """Be the rank."""
    name, backend = sys.argv[1:]
    own = torch.device(name if name != "cuda" else f"cuda:{os.environ['LOCAL_RANK']}")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group(backend)
    torch.set_num_threads(1)
    world = vpipe.World.join(device=own)
    size = HOLDING if own.type == "cuda" else TRIED
    wait, losses, steps = wait_for(own), {}, {}
    for contestant, build in {"vpipe": _vpipe_step, "torch": _torch_step}.items():
        _tell(world, {"begun": contestant})
        steps[contestant] = build(size, world)
        _measure(steps[contestant], wait, _NUM_WARMUP)
    _tell(world, {"begun": "both"})
    gc.freeze()
    round_ms: dict[str, list[float]] = {contestant: [] for contestant in steps}
    for _ in range(_NUM_ROUNDS):
        for contestant, step in steps.items():
            batch_ms, losses[contestant] = _measure(step, wait, _NUM_BATCHES)
            round_ms[contestant].append(statistics.median(batch_ms))
    # Rank 0 is the last to finish a batch; the last rank alone knows torch's loss.
    everyone = world.gather({"round_ms": round_ms, "losses": losses}, "what ranks measured")
    _tell(world, {"round_ms": everyone[0]["round_ms"], "losses": everyone[-1]["losses"]})
    dist.barrier()
    dist.destroy_process_group()


def _tell(world: vpipe.World, found: dict[str, Any]) -> None:
    if world.rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
