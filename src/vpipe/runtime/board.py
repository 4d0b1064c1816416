"""Tells every rank the loss, whichever stage computes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vpipe.runtime.wait import post, wait_for

__all__ = ["LossBoard"]

_SENDS_KEPT = 256
"""More than batches are in flight in any pipeline, so that the source never waits for a rank that is merely behind."""


class LossBoard:
    """Small vectors from rank `source` to all others, in order, without making the source wait.

    `group` is a gloo group of all ranks that nothing else uses for point-to-point messages; None means one process.
    """

    def __init__(self, source: int, num_values: int, group: dist.ProcessGroup | None) -> None:
        self._source = source
        self._num_values = num_values
        self._group = group
        self._rank = dist.get_rank() if group is not None else source
        self._published: deque[Tensor] = deque()
        self._sends: deque[list[tuple[dist.Work, Tensor]]] = deque()
        self._posted: tuple[dist.Work, Tensor] | None = None

    def publish(self, values: Sequence[float]) -> None:
        """On the source: send `values` to every other rank."""
        vector = torch.tensor(values, dtype=torch.float64)
        self._published.append(vector)
        if self._group is None:
            return
        others = [rank for rank in range(dist.get_world_size()) if rank != self._rank]
        self._sends.append([(post(dist.isend, vector, rank, "the loss", self._group, 0), vector) for rank in others])
        if len(self._sends) > _SENDS_KEPT:
            self._wait_oldest()

    def _wait_oldest(self) -> None:
        for work, _ in self._sends.popleft():
            wait_for(work, "the taking of the loss", None)

    def expect(self) -> None:
        """Elsewhere: post the receive of the next vector, so that it is here when `collect` asks."""
        if self._rank != self._source and self._posted is None:
            vector = torch.empty(self._num_values, dtype=torch.float64)
            self._posted = post(dist.irecv, vector, self._source, "the loss", self._group, 0), vector

    def collect(self) -> list[float]:
        """Return the next vector."""
        if self._rank == self._source:
            return [float(value) for value in self._published.popleft().tolist()]
        self.expect()
        assert self._posted is not None
        (work, vector), self._posted = self._posted, None
        wait_for(work, "the loss", self._source)
        return [float(value) for value in vector.tolist()]

    def finish(self) -> None:
        """On the source: wait until all that was sent has been taken."""
        while self._sends:
            self._wait_oldest()
