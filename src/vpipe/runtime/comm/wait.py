"""Post and await messages and collectives; the loss of another rank is told in the project's words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

from vpipe.runtime.comm.failure import raise_if_peer_lost

__all__ = ["post", "telling_losses", "wait_for"]


@contextmanager
def telling_losses(what: str, peer: int | None = None) -> Iterator[None]:
    """Run a call of torch.distributed that may find out that other ranks are gone.

    Raises:
        PeerLostError: `peer`, or some rank, died or did not answer in time; the text says `what` it was waited for.
    """
    try:
        yield
    except RuntimeError as error:
        raise_if_peer_lost(error, what, peer)
        raise


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
    with telling_losses(what, peer):
        work = operation(buffer, peer, group, tag)
    assert work is not None  # None is for ranks outside the group
    return work


def wait_for(work: dist.Work, what: str, peer: int | None) -> None:
    """Wait until `work` is done.

    Raises:
        PeerLostError: `peer` died or did not answer in time; the text names it and `what` it was waited for.
    """
    with telling_losses(what, peer):
        work.wait()
