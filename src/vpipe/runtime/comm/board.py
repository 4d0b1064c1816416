"""Tells every rank the loss, whichever stage computes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from vpipe.model.chain import ValueSpec
from vpipe.runtime.comm.message import MessageLayout
from vpipe.runtime.comm.shared_links import share_memory
from vpipe.runtime.comm.shared_memory import Inbox
from vpipe.runtime.comm.world import World

__all__ = ["LossBoard"]

_SENDS_KEPT = 256
"""More than batches are in flight in any pipeline, so that the source never waits for a rank that is merely behind."""

_TAG = 1 << 30
"""Not torch's default, which the caller may use in the same group."""

_WHAT = "the loss"


class LossBoard:
    """Small vectors from rank `source` to all others, in order, without making the source wait; collective to make.

    Nobody else uses this board's tag in the control group of `world`. Ranks of one machine share memory where they may.
    """

    def __init__(self, source: int, num_values: int, world: World, *, shared_memory: bool = False) -> None:
        self._source = source
        self._num_values = num_values
        self._world = world
        self._rank = world.rank
        self._others = [rank for rank in range(world.num_ranks) if rank != source]
        self._layout = MessageLayout(0, [ValueSpec("loss", (num_values,), torch.float64, False)])
        shared = share_memory([(source, rank) for rank in self._others], world, allowed=shared_memory)
        self._outboxes, self._inboxes = shared.outboxes, shared.inboxes
        self._inbox = self._inboxes.get((source, self._rank))
        self._num_published = self._num_collected = 0
        self._published: deque[Tensor] = deque()
        self._sends: deque[list[tuple[dist.Work, Tensor]]] = deque()
        self._posted: tuple[dist.Work, Tensor] | None = None

    def publish(self, values: Sequence[float]) -> None:
        """On the source: send `values` to every other rank."""
        vector = torch.tensor(values, dtype=torch.float64)
        self._published.append(vector)
        for outbox in self._outboxes.values():
            outbox.send(self._layout, self._num_published, {"loss": vector}, lambda: f"the taking of {_WHAT}")
        self._num_published += 1
        far = [rank for rank in self._others if (self._source, rank) not in self._outboxes]
        if far:
            self._sends.append([(self._post(dist.isend, vector, rank), vector) for rank in far])
        if len(self._sends) > _SENDS_KEPT:
            self._wait_oldest()

    def _post(self, operation: Callable[..., dist.Work | None], vector: Tensor, rank: int) -> dist.Work:
        """Start `dist.isend` or `dist.irecv`; torch knows a rank by its process."""
        with self._world.activity.waiting(_WHAT, (rank,), self._world.control):
            work = operation(vector, self._world.processes[rank], self._world.control, _TAG)
        assert work is not None  # None is for ranks outside the group
        return work

    def _wait_oldest(self) -> None:
        with self._world.activity.waiting(f"the taking of {_WHAT}", group=self._world.control):
            for work, _ in self._sends.popleft():
                work.wait()

    def expect(self) -> None:
        """Elsewhere: post the receive of the next vector, so that it is here when `collect` asks."""
        if self._rank != self._source and self._inbox is None and self._posted is None:
            vector = torch.empty(self._num_values, dtype=torch.float64)
            self._posted = self._post(dist.irecv, vector, self._source), vector

    def collect(self) -> list[float]:
        """Return the next vector."""
        if self._rank == self._source:
            return [float(value) for value in self._published.popleft().tolist()]
        if self._inbox is not None:
            return self._collect_shared(self._inbox)
        self.expect()
        assert self._posted is not None
        (work, vector), self._posted = self._posted, None
        with self._world.activity.waiting(_WHAT, (self._source,), self._world.control):
            work.wait()
        return [float(value) for value in vector.tolist()]

    def _collect_shared(self, inbox: Inbox) -> list[float]:
        inbox.give_back()
        if not inbox.take():
            inbox.wait(_WHAT)
        found = inbox.receive(self._layout, self._num_collected)
        self._num_collected += 1
        return [float(value) for value in found["loss"].tolist()]

    def forget(self) -> None:
        """On a source that is the only rank: drop what was published and not collected."""
        self._published.clear()

    def finish(self) -> None:
        """On the source: wait until all that was sent has been taken."""
        while self._sends:
            self._wait_oldest()
