"""Post and await one message; the loss of a peer is told in the project's words."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from vpipe.runtime.failure import raise_if_peer_lost

__all__ = ["post", "wait_for"]


def post(
    operation: Callable[..., dist.Work | None],
    buffer: Tensor,
    peer: int,
    what: str,
    group: dist.ProcessGroup | None,
    tag: int,
) -> dist.Work:
    """Start `dist.isend` or `dist.irecv`.

    Raises:
        PeerLostError: the connection to `peer` is gone.
    """
    try:
        work = operation(buffer, peer, group, tag)
    except RuntimeError as error:
        raise_if_peer_lost(error, what, peer)
        raise
    assert work is not None  # None is for ranks outside the group
    return work


def wait_for(work: dist.Work, what: str, peer: int | None) -> None:
    """Wait until `work` is done.

    Raises:
        PeerLostError: `peer` died or did not answer in time; the text names it and `what` it was waited for.
    """
    try:
        work.wait()
    except RuntimeError as error:
        raise_if_peer_lost(error, what, peer)
        raise
