"""The cut that torchgpipe's `balance_by_time` makes, written from its published description.

Every block is timed on one device, forward and backward, over and over for a second. The times' sums are cut by the
block partition of Bárány and Grinberg ("Block partitions of sequences", Israel J. Math. 2015), whose parts differ by at
most the largest element: of the times less the smallest one, as torchgpipe has it. Devices count as equal.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from vpipe.model.chain import Chain

__all__ = ["balance_by_time", "block_partition"]

TIMEOUT_S = 1.0


def balance_by_time(chain: Chain, num_stages: int, sample: torch.Tensor) -> list[int]:
    """Return blocks per stage; the chain's blocks each take the one tensor that the one before them gives."""
    modules = [chain.materialise(index, 0) for index in range(len(chain))]
    sums = [0.0] * len(modules)
    end = time.perf_counter() + TIMEOUT_S
    while time.perf_counter() < end:
        value = sample
        for index, module in enumerate(modules):
            value = value.detach().requires_grad_()
            start = time.perf_counter()
            value = module(value)
            torch.autograd.backward(value, value)
            sums[index] += time.perf_counter() - start
    return block_partition(sums, num_stages)


def block_partition(sequence: Sequence[float], num_parts: int) -> list[int]:
    """Return the sizes of contiguous parts whose sums differ by at most the largest element.

    From equal counts on: while the largest part exceeds the smallest by more, elements move one by one from part to
    part towards the smallest, from the side where the largest is.
    """
    low, span = min(sequence), (max(sequence) - min(sequence)) or 1.0
    numbers = [(value - low) / span for value in sequence]
    ends = [len(numbers) // num_parts * (part + 1) for part in range(num_parts - 1)] + [len(numbers)]

    def sums() -> list[tuple[float, int]]:
        starts = [0, *ends[:-1]]
        return [(sum(numbers[start:end]), part) for part, (start, end) in enumerate(zip(starts, ends, strict=True))]

    while True:
        largest, top = max(sums())
        while True:
            smallest, bottom = min(sums())
            if largest <= smallest + 1:
                return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
            if top < bottom:
                giver = bottom - 1
                ends[giver] -= 1
            else:
                giver = bottom + 1
                ends[bottom] += 1
            if giver == top:
                break
