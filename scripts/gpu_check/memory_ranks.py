"""A rank that trains by several plans, and tells what its ledger and torch's allocator say: its argument is a device.

``torchrun --nproc-per-node 3 -m gpu_check.memory_ranks cuda:0`` prints one JSON object per plan.
"""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from typing import Any

import torch

import vpipe
from gpu_check.blocks import HOLDING, TRIED, Size, compute_in_steps, cross_entropy, warm_up

__all__ = ["Peaks"]

_NUM_BATCHES = 4
_STATS = {name: f"{name}_bytes.all.peak" for name in ("allocated", "requested", "active", "reserved")}
"""What tensors were given, with what the allocator rounds up to; what they asked for; with what a stream still uses;
what the allocator has from the device."""


class Peaks:
    """The highest of the allocator's numbers, whoever resets them meanwhile; VPipe's own meter does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._highest = dict.fromkeys(_STATS, 0)
        self._reset = torch.cuda.reset_peak_memory_stats
        torch.cuda.reset_peak_memory_stats = self._note_and_reset

    def start(self) -> None:
        """Forget what was until now."""
        self._highest = dict.fromkeys(_STATS, 0)
        if self._device.type == "cuda":
            self._reset(self._device)

    def highest(self) -> dict[str, int]:
        """Return the most bytes since the start; nothing for a CPU."""
        if self._device.type != "cuda":
            return {}
        stats = torch.cuda.memory_stats(self._device)
        return {name: max(self._highest[name], int(stats.get(key, 0))) for name, key in _STATS.items()}

    def _note_and_reset(self, device: Any = None) -> None:
        self._highest = self.highest()
        self._reset(device)


def _plans(size: Size) -> dict[str, vpipe.Plan]:
    make = partial(vpipe.Plan, num_microbatches=size.num_microbatches)
    return {
        "1f1b": make("1f1b"),
        "1f1b, recompute": make("1f1b", policies=["recompute"] * size.num_blocks),
        "gpipe": make("gpipe"),
        "gpipe, swap": make("gpipe", policies=["swap"] * size.num_blocks),
        "pipedream": make("pipedream"),
        "pipedream, swap_versions": make("pipedream", swap_versions=True),
    }


def _train(plan: vpipe.Plan, size: Size, world: vpipe.World, peaks: Peaks) -> dict[str, Any]:
    """Train by a plan and return what this rank held at most, in bytes."""
    before = torch.cuda.memory_allocated(world.device) if world.device.type == "cuda" else 0
    with vpipe.Pipeline(
        size.build_blocks(dropout=0.1),
        cross_entropy,
        plan=plan,
        optimizer=torch.optim.AdamW,
        memory=vpipe.Memory(watch="all"),
        world=world,
    ) as pipeline:
        peaks.start()
        losses = [result.loss for result in pipeline.train([size.build_batch()] * _NUM_BATCHES)]
        link, peak = pipeline.host_link, pipeline.ledger.peak
        return {
            "before": before,
            "ledger": peak.total,
            "by_kind": dict(peak.by_kind),
            "action": peak.action,
            "allocator": peaks.highest(),
            "bytes_offloaded": link.bytes_offloaded if link else 0,
            "losses": losses,
        }


def main() -> None:
    """Be the rank."""
    compute_in_steps()
    with vpipe.World.join(device=sys.argv[1], timeout_seconds=60) as world:
        size = HOLDING if world.device.type == "cuda" else TRIED
        peaks = Peaks(world.device)
        warm_up(world.device, size)
        for name, plan in _plans(size).items():
            mine = _train(plan, size, world, peaks)
            gc.collect()  # of what one plan left nothing may count for the next
            everyone = world.gather(mine, "what ranks held")
            if world.rank == 0:
                sys.stdout.write(json.dumps({"name": name, "ranks": everyone}) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
