"""Why the run failed, told by the rank that knows to the ranks that only see a closed connection.

The rank that fails first publishes its message in the store of the process group; a rank that lost its peer looks there
before it complains. The store outlives the ranks when torchrun or `vpipe train` hosts it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from vpipe.errors import PeerLostError, VPipeError

__all__ = ["Failures", "peer_ended", "peer_silent", "raise_if_peer_lost", "telling_losses"]

KEY = "vpipe/failure"

CONSULT_SECONDS = 1.5
"""How long a rank that lost its peer waits for the culprit's message, and so lets the culprit end first."""

_CLOSED = re.compile(
    r"connection closed|connection reset|broken pipe|socket closed|remote process exited|connection refused", re.I
)
_TIMED_OUT = re.compile(r"timed out waiting|wait timeout|application timeout|watchdog caught", re.I)
_MILLISECONDS = re.compile(r"(\d+) ?ms")


class Failures:
    """What a rank says when it fails, and hears of others; without a store it says and hears nothing."""

    def __init__(self) -> None:
        self._store: Store | None = None
        self._rank = 0
        self._key = KEY

    def attach(self, store: Store, rank: int, name: str = "") -> None:
        """Use `store`, which all ranks see, for what `rank` says to the others of a world called `name`."""
        self._store, self._rank, self._key = store, rank, KEY + name

    def publish(self, message: str) -> None:
        """Tell the other ranks that this one stops because of `message`; the first message of all ranks stays."""
        if self._store is None:
            return
        try:
            self._store.compare_set(self._key, "", f"rank {self._rank} stopped: {message}")
        except RuntimeError:
            # The store's host is gone too: nobody is left to read the message, and the failure itself is what counts.
            return

    def find(self, wait_seconds: float = 0.0) -> str | None:
        """Return the first published failure, ``rank 3 stopped: ...``, waiting up to `wait_seconds` for one."""
        if self._store is None:
            return None
        deadline = time.monotonic() + wait_seconds
        try:
            while not self._store.check([self._key]):
                if time.monotonic() >= deadline:
                    return None
                time.sleep(0.05)
            return bytes(self._store.get(self._key)).decode()
        except RuntimeError:
            # See `publish`: without the store there is no message to be found.
            return None

    def report(self, error: Exception) -> None:
        """Publish `error`, or explain it by the failure of another rank if this one only lost its peer.

        Raises:
            PeerLostError: `error` is the loss of a peer; the text ends with the culprit's own message if there is one.
        """
        lost = error if isinstance(error, PeerLostError) else _peer_lost(error, "a message", None)
        if lost is None:
            self.publish(str(error) if isinstance(error, VPipeError) else f"{type(error).__name__}: {error}")
            return
        cause = self.find(CONSULT_SECONDS)
        if cause is None:
            self.publish(str(lost))
            raise lost from error.__cause__ if lost is error else error
        raise PeerLostError(f"{lost}: {cause}") from error


def raise_if_peer_lost(error: RuntimeError, waiting_for: str, peer: int | None = None) -> None:
    """Raise PeerLostError if `error` is how torch says that a peer died or is silent, return otherwise.

    Args:
        error: what torch raised while this rank was waiting.
        waiting_for: the action, such as ``1F3``.
        peer: the rank it was expected from; None when several took part.

    Raises:
        PeerLostError: names the action and the peer.
    """
    lost = _peer_lost(error, waiting_for, peer)
    if lost is not None:
        raise lost from error


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


def peer_ended(peer: int | None, waiting_for: str) -> PeerLostError:
    """Return the error for a rank that is gone; `peer` None means one of several."""
    return PeerLostError(f"{_who(peer)} ended while this rank was waiting for {waiting_for}")


def peer_silent(peer: int | None, waiting_for: str, seconds: float | None = None) -> PeerLostError:
    """Return the error for a rank that did not answer within `seconds`."""
    after = "" if seconds is None else f" for {seconds:g} s"
    return PeerLostError(
        f"waited{after} for {waiting_for} from {_who(peer)}, which does not answer; "
        "if it is only slow, raise launch.timeout_seconds (of World.join: timeout_seconds)"
    )


def _who(peer: int | None) -> str:
    return "another rank" if peer is None else f"rank {peer}"


def _peer_lost(error: Exception, waiting_for: str, peer: int | None) -> PeerLostError | None:
    text = str(error)
    if not isinstance(error, RuntimeError):  # what torch.distributed raises, gloo and NCCL alike
        return None
    if _TIMED_OUT.search(text):
        milliseconds = _MILLISECONDS.search(text)
        return peer_silent(peer, waiting_for, int(milliseconds[1]) / 1000 if milliseconds else None)
    if _CLOSED.search(text) or isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return peer_ended(peer, waiting_for)
    return None
