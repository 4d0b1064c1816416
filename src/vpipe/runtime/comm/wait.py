"""Await messages and collectives; the loss of another rank is told in the project's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from vpipe.runtime.comm.failure import raise_if_peer_lost

__all__ = ["telling_losses", "wait_for"]


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


def wait_for(work: dist.Work, what: str, peer: int | None) -> None:
    """Wait until `work` is done.

    Raises:
        PeerLostError: `peer` died or did not answer in time; the text names it and `what` it was waited for.
    """
    with telling_losses(what, peer):
        work.wait()
