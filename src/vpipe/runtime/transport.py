"""Moves values between stages: receives are posted ahead, sends never make compute wait.

Messages travel on *channels*, one per cut and direction. With gloo a message is matched by a tag made of channel and serial number.
NCCL has no tags and runs the operations of a communicator in order, so there every directed pair of ranks gets one communicator for
activations and one for gradients; `validate` has shown that the order of sends equals the order of receives on each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from vpipe.model.chain import ValueSpec
from vpipe.runtime.buffers import BufferPool
from vpipe.runtime.message import MessageLayout
from vpipe.runtime.wait import post, wait_for
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.placement import Placement

__all__ = ["Transport"]

_RECEIVES_AHEAD = 2
_TAG_LIMIT = 1 << 31


@dataclass
class _Channel:
    """One cut in one direction, as seen from one of its two ranks."""

    index: int
    peer: int
    layout: MessageLayout
    group: dist.ProcessGroup | None
    upcoming: deque[int] = field(default_factory=deque)
    posted: dict[int, tuple[dist.Work, Tensor]] = field(default_factory=dict)
    sent: dict[int, tuple[dist.Work, Tensor]] = field(default_factory=dict)


class Transport:
    """Point-to-point messages of one rank.

    `announce` is told what the rank is about to wait for, so that a hang or a death can be explained.
    """

    def __init__(
        self,
        placement: Placement,
        rank: int,
        device: torch.device,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._placement = placement
        self._rank = rank
        self._device = device
        self._announce = announce
        self._is_nccl = dist.is_initialized() and dist.get_backend() == "nccl"
        self._wire = device if self._is_nccl else torch.device("cpu")
        self._pool = BufferPool(self._wire)
        self._groups = self._open_groups() if self._is_nccl else {}
        self._channels: dict[tuple[Kind, int], _Channel] = {}
        self._base = 0
        self._span = 0
        self._window = 0
        self.bytes_sent = 0
        self.bytes_received = 0

    def _open_groups(self) -> dict[tuple[int, int, bool], dist.ProcessGroup]:
        ranks = [self._placement.rank_of(stage) for stage in range(self._placement.num_stages)]
        forward = {(source, target, True) for source, target in pairwise(ranks) if source != target}
        backward = {(target, source, False) for source, target, _ in forward}
        # new_group is collective: every rank makes every group, in the same order.
        return {link: dist.new_group(sorted(link[:2]), backend="nccl") for link in sorted(forward | backward)}

    def start(
        self,
        actions: Iterable[Action],
        crossing: Mapping[int, Sequence[ValueSpec]],
        num_microbatches: int,
        window: int,
    ) -> None:
        """Begin a program: learn what will be received in which order, and post the first receives.

        `crossing[s]` is what crosses the cut in front of stage s. At most `window` sends stay open per channel: more
        cannot be unanswered when `window` is the number of microbatches in flight.
        """
        self._base += self._span
        self._span, self._window = num_microbatches, window
        self._channels = {}
        for action in actions:
            if action.kind not in _CUT_OFFSET:
                continue
            channel = self._channel(action, crossing)
            if action.kind in (Kind.RECV_F, Kind.RECV_B) and channel.layout.specs:
                channel.upcoming.append(action.microbatch)
        for channel in self._channels.values():
            for _ in range(_RECEIVES_AHEAD):
                self._post(channel)

    def _channel(self, action: Action, crossing: Mapping[int, Sequence[ValueSpec]]) -> _Channel:
        key = (action.kind, action.stage)
        if key not in self._channels:
            cut = action.stage + _CUT_OFFSET[action.kind]
            forward = action.kind in (Kind.SEND_F, Kind.RECV_F)
            specs = [spec for spec in crossing[cut] if forward or spec.requires_grad]
            index = 2 * cut + (0 if forward else 1)
            other = cut if action.stage == cut - 1 else cut - 1
            peer = self._placement.rank_of(other)
            sending = action.kind in (Kind.SEND_F, Kind.SEND_B)
            link = (self._rank, peer, forward) if sending else (peer, self._rank, forward)
            self._channels[key] = _Channel(index, peer, MessageLayout(index, specs), self._groups.get(link))
        return self._channels[key]

    def _tag(self, channel: _Channel, microbatch: int) -> int:
        num_channels = 2 * self._placement.num_stages + 2
        return (channel.index + num_channels * (self._base + microbatch)) % _TAG_LIMIT

    def _post(self, channel: _Channel) -> None:
        if not channel.upcoming:
            return
        microbatch = channel.upcoming.popleft()
        buffer = self._pool.take(channel.layout.num_bytes)
        tag = self._tag(channel, microbatch)
        work = post(dist.irecv, buffer, channel.peer, f"microbatch {microbatch}", channel.group, tag)
        channel.posted[microbatch] = (work, buffer)

    def send(self, action: Action, values: Mapping[str, Tensor]) -> None:
        """Start sending `values` (by name) for a SEND_F or SEND_B; return without waiting for the receiver."""
        channel = self._channels[action.kind, action.stage]
        if not channel.layout.specs:
            return
        buffer = self._pool.take(channel.layout.num_bytes)
        channel.layout.pack(buffer, self._base + action.microbatch, values)
        tag = self._tag(channel, action.microbatch)
        work = post(dist.isend, buffer, channel.peer, f"room to send {action}", channel.group, tag)
        channel.sent[action.microbatch] = (work, buffer)
        self.bytes_sent += channel.layout.num_bytes
        if len(channel.sent) > self._window:
            self._complete(channel, next(iter(channel.sent)))

    def receive(self, action: Action) -> dict[str, Tensor]:
        """Wait for the message of a RECV_F or RECV_B and return its values by name, on the compute device.

        Raises:
            PeerLostError: the sending rank died or did not answer in time.
            TransportError: another message arrived than the one that was waited for.
        """
        channel = self._channels[action.kind, action.stage]
        if not channel.layout.specs:
            return {}
        work, buffer = channel.posted.pop(action.microbatch)
        what = _WAITED_FOR[action.kind](action)
        self._announce(f"waiting for {what} from rank {channel.peer}")
        wait_for(work, what, channel.peer)
        self._announce("running")
        self._post(channel)
        self.bytes_received += channel.layout.num_bytes
        if action.kind is Kind.RECV_B and (forward := self._channels.get((Kind.SEND_F, action.stage))) is not None:
            # The gradient's arrival shows that the forward message was received.
            self._complete(forward, action.microbatch)
        if self._is_nccl:
            return channel.layout.views(buffer)
        values = channel.layout.unpack(buffer, self._base + action.microbatch)
        return {name: value.to(self._device) for name, value in values.items()}

    def _complete(self, channel: _Channel, microbatch: int) -> None:
        if microbatch in channel.sent:
            work, _ = channel.sent.pop(microbatch)
            self._announce(f"waiting for rank {channel.peer} to take microbatch {microbatch}")
            wait_for(work, f"the taking of microbatch {microbatch}", channel.peer)
            self._announce("running")

    def finish(self) -> None:
        """End a program: wait until all that was sent has been taken."""
        for channel in self._channels.values():
            for microbatch in list(channel.sent):
                self._complete(channel, microbatch)


_CUT_OFFSET = {Kind.SEND_F: 1, Kind.RECV_F: 0, Kind.SEND_B: 0, Kind.RECV_B: 1}
_WAITED_FOR: dict[Kind, Callable[[Action], str]] = {
    Kind.RECV_F: lambda action: f"{action.stage - 1}F{action.microbatch}",
    Kind.RECV_B: lambda action: f"{action.stage + 1}B{action.microbatch}",
}
