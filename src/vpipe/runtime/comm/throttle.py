"""A slow network on a fast one: messages leave as if they had travelled on a link of some latency and bandwidth.

A message of b bytes keeps its link busy for ``b / bandwidth`` and arrives `latency` later; a directed pair of ranks is
one link and carries one message at a time. This is the link that `Costs` describes, made of time: each link is a
thread on the sending rank that holds messages back and then really sends them, so a rank that sends never waits. What
the real network takes comes on top.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor

from vpipe.errors import ConfigError
from vpipe.runtime.comm.transport import Transport

__all__ = ["SlowLink", "emulate_slow_links"]

_Key = tuple[int, int, bool]
"""As in `Transport`: source rank, target rank, whether activations travel on it or gradients."""


@dataclass(frozen=True)
class SlowLink:
    """What every link is made to be, in each direction."""

    latency_ms: float = 0.0
    bandwidth_bytes_per_ms: float | None = None
    """None: messages do not wait for each other."""

    def __post_init__(self) -> None:
        if self.latency_ms < 0 or (self.bandwidth_bytes_per_ms is not None and self.bandwidth_bytes_per_ms <= 0):
            raise ConfigError(
                "a slow link needs a latency of at least 0 ms and a bandwidth above 0, got "
                f"latency_ms={self.latency_ms}, bandwidth_bytes_per_ms={self.bandwidth_bytes_per_ms}"
            )

    def occupied_ms(self, num_bytes: int) -> float:
        """Return how long a message keeps the link busy."""
        return num_bytes / self.bandwidth_bytes_per_ms if self.bandwidth_bytes_per_ms else 0.0


def emulate_slow_links(transport: Transport, link: SlowLink) -> None:
    """Make all links of `transport` slow, before its first program starts.

    Raises:
        ConfigError: messages are matched by their order, as with nccl, where they cannot be held back.
    """
    transport.stand_in(lambda groups: throttle(groups, link))


def throttle(groups: Mapping[_Key, dist.ProcessGroup], link: SlowLink) -> dict[_Key, dist.ProcessGroup]:
    """Return stand-ins for the groups of links: those with the same source and target share one slow link."""
    lines: dict[tuple[int, int], _Line] = {}
    slow = {}
    for key, group in groups.items():
        line = lines.setdefault(key[:2], _Line(link))
        slow[key] = cast(dist.ProcessGroup, _SlowGroup(group, line))
    return slow


class _SlowGroup:
    """Sends through a line, receives as ever; equal to its group, so that torch.distributed knows it by that."""

    def __init__(self, group: dist.ProcessGroup, line: _Line) -> None:
        self._group = group
        self._line = line

    def __hash__(self) -> int:
        return hash(self._group)

    def __eq__(self, other: object) -> bool:
        return other is self._group or other is self

    def send(self, tensors: Sequence[Tensor], peer: int, tag: int) -> _HeldSend:
        return self._line.send(self._group, tensors, peer, tag)

    def recv(self, tensors: Sequence[Tensor], peer: int, tag: int) -> dist.Work:
        return self._group.recv(list(tensors), peer, tag)


class _HeldSend:
    """What stands for a send that has not begun yet: its `wait` is that of the send, once it has."""

    def __init__(self) -> None:
        self._begun = Event()
        self._work: dist.Work | None = None
        self._error: RuntimeError | None = None

    def begin(self, group: dist.ProcessGroup, arguments: tuple[list[Tensor], int, int]) -> None:
        """Really send, on the line's thread; an error is for the rank that waits."""
        try:
            self._work = group.send(*arguments)
        except RuntimeError as error:
            self._error = error
        self._begun.set()

    def wait(self, *timeout: Any) -> bool:
        """Wait until the receiver has the message."""
        self._begun.wait()
        if self._error is not None:
            raise self._error
        assert self._work is not None
        return bool(self._work.wait(*timeout))

    def is_completed(self) -> bool:
        """Tell whether `wait` would return at once."""
        return self._error is not None or (self._work is not None and self._work.is_completed())


class _Line:
    """One slow link: lets messages leave one after another, each when it would have arrived."""

    def __init__(self, link: SlowLink) -> None:
        self._link = link
        self._free = 0.0
        self._queue: SimpleQueue[tuple[float, _HeldSend, dist.ProcessGroup, tuple[list[Tensor], int, int]]]
        self._queue = SimpleQueue()
        self._thread: Thread | None = None

    def send(self, group: dist.ProcessGroup, tensors: Sequence[Tensor], peer: int, tag: int) -> _HeldSend:
        """Queue a message and return at once."""
        if self._thread is None:
            self._thread = Thread(target=self._work, name=f"vpipe link to rank {peer}", daemon=True)
            self._thread.start()
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._free = max(self._free, time.perf_counter()) + self._link.occupied_ms(num_bytes) / 1e3
        held = _HeldSend()
        self._queue.put((self._free + self._link.latency_ms / 1e3, held, group, (list(tensors), peer, tag)))
        return held

    def _work(self) -> None:
        while True:
            due, held, group, arguments = self._queue.get()
            time.sleep(max(0.0, due - time.perf_counter()))
            held.begin(group, arguments)
            del held, arguments  # while this waits for the next message, nothing of the last one is kept
