"""Which links between ranks can be shared memory: found out by all of them together."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from vpipe.runtime.comm.shared_memory import Inbox, Outbox, open_inbox, open_outbox
from vpipe.runtime.comm.world import World

__all__ = ["SharedLinks", "share_memory"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Link = TypeVar("Link", bound=tuple[int, ...])
"""Source rank, target rank, and whatever tells links between them apart."""


@dataclass(frozen=True)
class SharedLinks(Generic[Link]):
    """The ends of those links that are shared memory, on one rank."""

    outboxes: Mapping[Link, Outbox]
    inboxes: Mapping[Link, Inbox]
    are_all: bool
    """Whether all links of all ranks are: then nobody needs a socket."""


def share_memory(links: Collection[Link], world: World, *, allowed: bool = True) -> SharedLinks[Link]:
    """Open those of `links` whose two ranks see the same memory.

    Collective over `world`. A rank for which it is not `allowed` takes no part in a link.

    Raises:
        PeerLostError: another rank ended meanwhile.
    """
    rank = world.rank
    own = [link for link in links if link[0] == rank]
    offers = {link: outbox for link in own if allowed and (outbox := open_outbox()) is not None}
    inboxes = {}
    for invitations, _ in _tell_all({link: outbox.invitation for link, outbox in offers.items()}, world):
        for link, invitation in invitations.items():
            if not allowed or link[1] != rank:
                continue
            if (inbox := open_inbox(invitation, link[0], world.timeout, world.activity)) is not None:
                inboxes[link] = inbox
    outboxes, num_opened = {}, 0
    for opened, pid in _tell_all(dict.fromkeys(inboxes), world):
        num_opened += len(opened)
        for link in opened.keys() & offers.keys():
            offers[link].connect(link[1], pid, world.timeout, world.activity)
            outboxes[link] = offers[link]
    if own:
        logger.info("%d of %d links from this rank are shared memory", len(outboxes), len(own))
    return SharedLinks(outboxes, inboxes, are_all=num_opened == len(links))


def _tell_all(told: Mapping[Link, T], world: World) -> list[tuple[Mapping[Link, T], int]]:
    """Return what every rank told, with its process."""
    return world.gather((dict(told), os.getpid()), "the links between ranks to open")
