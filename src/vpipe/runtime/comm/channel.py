"""One cut in one direction, as seen from one of its two ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from vpipe.model.chain import ValueSpec
from vpipe.runtime.comm.message import Message, MessageLayout

__all__ = ["Channel", "Crossing", "Link", "Microbatches"]

Link = tuple[int, int, bool]
"""Source rank, target rank, and whether activations travel on it or gradients."""

Crossing = Mapping[int, Sequence[ValueSpec]]
"""What crosses the cut in front of each stage for one microbatch."""


class Microbatches(Protocol):
    """What the transport has to know of a program's microbatches, whose shapes may differ."""

    def crossing(self, serial: int) -> Crossing:
        """Return what crosses the cuts; nothing for a microbatch that is left out."""

    def knows(self, serial: int, now: int) -> bool:
        """Tell whether that can be said while microbatch `now` is waited for."""


@dataclass
class Channel:
    """Where messages of one cut in one direction are laid out, and kept while they are on their way.

    What serves all channels of this index, in whatever program, is given: `messages` and `layouts`.
    """

    index: int
    """Twice the cut, and one more for gradients."""
    peer: int
    link: Link
    post: Callable[[Tensor, int], dist.Work] | None
    """Sends or receives a buffer under a tag; None where no link needs a communicator."""
    wire: torch.device
    messages: list[Message]
    """Memory that was used before and is free, or will be, of whatever layout."""
    layouts: dict[tuple[ValueSpec, ...], MessageLayout]
    posted: dict[int, tuple[dist.Work, Message]] = field(default_factory=dict)
    sent: dict[int, tuple[dist.Work, Message]] = field(default_factory=dict)
    _crossing: Crossing | None = None
    _layout: MessageLayout = field(init=False)

    def layout_of(self, crossing: Crossing) -> MessageLayout:
        """Return how a message lies where this crosses the cuts; most lie as the one before."""
        if crossing is not self._crossing:
            cut, is_gradient = divmod(self.index, 2)
            specs = tuple(
                spec
                for spec in crossing.get(cut, ())
                if spec.same_as is None and (spec.requires_grad or not is_gradient)
            )
            if specs not in self.layouts:
                self.layouts[specs] = MessageLayout(self.index, specs, self.wire)
            self._crossing, self._layout = crossing, self.layouts[specs]
        return self._layout

    def take(self, layout: MessageLayout) -> Message:
        """Return a message to fill or to receive into; on a GPU always a new one, as its allocator reuses memory.

        It takes the place of one that is free, even if that has too little memory: so there are no more of them than
        are in use at once.
        """
        free = [message for message in self.messages if message.is_free]
        if not free:
            return Message(layout, self.wire)
        fitting = [message for message in free if message.capacity >= layout.num_bytes]
        chosen = min(fitting, key=lambda message: message.capacity) if fitting else free[0]
        self.messages.remove(chosen)
        if chosen.layout is layout:
            return chosen
        return chosen.turned_into(layout) if fitting else Message(layout, self.wire)

    def name(self, microbatch: int) -> str:
        """Name the action whose result a message of this channel carries."""
        cut, is_gradient = divmod(self.index, 2)
        return f"{cut}B{microbatch}" if is_gradient else f"{cut - 1}F{microbatch}"
