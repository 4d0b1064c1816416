"""Bytes that a rank holds, by kind, as they come and go, and the most there ever were."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from itertools import count
from threading import Lock

from vpipe.errors import MemoryLimitError

__all__ = ["KINDS", "Ledger", "MemoryUse"]

KINDS = ("parameters", "versions", "gradients", "optimizer", "activations", "buffers", "workspace")
"""Newest weights; older ones that are kept; gradients; the optimizer's state; what is held for backwards; the model's
buffers, frozen weights and messages; what an action needs for a moment."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one rank by kind, and where in the program."""

    by_kind: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    action: str = ""
    """What the rank was doing, in the text form of actions."""

    @property
    def total(self) -> int:
        """Sum up all kinds."""
        return sum(self.by_kind.values())


class Ledger:
    """One rank's account. Memory that several hold counts once.

    Activations are entered by whoever holds them (`owner`) and where they lie (`place`), all else as sums. Entries may
    come from several threads. With a `limit` in bytes, an action that took more is an error.
    """

    def __init__(self, rank: int, limit: int | None = None) -> None:
        self.limit = limit
        self.peak = MemoryUse()
        """The moment at which the rank held most."""
        self.peak_by_kind = dict.fromkeys(KINDS, 0)
        """The most of each kind, each at a moment of its own."""
        self._rank = rank
        self._now = dict.fromkeys(KINDS, 0)
        self._sums: dict[tuple[str, Hashable], int] = {}
        self._holders: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._owned: dict[Hashable, set[int]] = {}
        self._high = dict(self._now)
        self._lock = Lock()
        self._tokens = count(1)

    @property
    def now(self) -> MemoryUse:
        """Return what is held, without workspace."""
        with self._lock:
            return MemoryUse(dict(self._now))

    @property
    def total(self) -> int:
        """Return how many bytes are held, without workspace."""
        with self._lock:
            return sum(self._now.values())

    def put(self, kind: str, key: Hashable, num_bytes: int) -> None:
        """Enter the bytes of `kind` that `key` has, instead of what it had."""
        with self._lock:
            self._now[kind] += num_bytes - self._sums.pop((kind, key), 0)
            if num_bytes:
                self._sums[kind, key] = num_bytes
            self._mark()

    def entry(self, kind: str, key: Hashable) -> int:
        """Return the bytes of `kind` that `key` has."""
        return self._sums.get((kind, key), 0)

    def add(self, kind: str, key: Hashable, num_bytes: int) -> None:
        """Enter by how many bytes of `kind` `key` has more than it had."""
        with self._lock:
            self._now[kind] += num_bytes
            self._sums[kind, key] = self._sums.get((kind, key), 0) + num_bytes
            self._mark()

    def is_held(self, place: int) -> bool:
        """Tell whether activations lie at this place."""
        return place in self._holders

    def hold(self, owner: Hashable, place: int, num_bytes: int) -> None:
        """Enter activations of `owner` at a place."""
        with self._lock:
            self._hold(owner, place, num_bytes)
            self._mark()

    def hold_new(self, owner: Hashable, num_bytes: int) -> int:
        """Enter activations that are about to lie somewhere; return what stands for their place."""
        # The address will be one that another entry may still name, which is freed in a backward that goes on.
        token = -next(self._tokens)
        self.hold(owner, token, num_bytes)
        return token

    def release(self, owner: Hashable, place: int) -> None:
        """Strike out activations of `owner` at a place."""
        with self._lock:
            self._release(owner, place)

    def replace(self, owner: Hashable, sizes: Mapping[int, int]) -> None:
        """Enter the places and bytes that `owner` holds now, instead of all that it held."""
        with self._lock:
            for place in self._owned.get(owner, set()) - sizes.keys():
                self._release(owner, place)
            for place, num_bytes in sizes.items():
                self._hold(owner, place, num_bytes)
            self._mark()

    def forget_microbatches(self) -> None:
        """Drop what is held for microbatches, of a program that did not get to its end."""
        for owner in list(self._owned):
            self.replace(owner, {})
        for kind, key in list(self._sums):
            if kind == "activations":
                self.put(kind, key, 0)
        with self._lock:
            self._high = dict(self._now)

    def settle(self, action: str, workspace: int = 0) -> None:
        """Close the account of one action, which needed `workspace` bytes for a moment on top.

        Raises:
            MemoryLimitError: the rank held more than its limit.
        """
        with self._lock:
            use = MemoryUse(self._high | {"workspace": workspace}, action)
            self._high = dict(self._now)
        for kind, num_bytes in use.by_kind.items():
            self.peak_by_kind[kind] = max(self.peak_by_kind[kind], num_bytes)
        if use.total > self.peak.total:
            self.peak = use
        if self.limit is not None and use.total > self.limit:
            self._refuse(use, self.limit)

    def _refuse(self, use: MemoryUse, limit: int) -> None:
        kinds = sorted(use.by_kind.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{kind} {num_bytes:,}" for kind, num_bytes in kinds if num_bytes)
        raise MemoryLimitError(
            f"rank {self._rank} held {use.total:,} bytes in {use.action}, {use.total - limit:,} more than its "
            f"memory limit of {limit:,} ({parts}); let more blocks recompute or swap (`vpipe plan` says which), use "
            "smaller microbatches (of Pipeline.evaluate: microbatch_size), or raise the limit"
        )

    def _hold(self, owner: Hashable, place: int, num_bytes: int) -> None:
        places = self._owned.setdefault(owner, set())
        if place in places:
            # It may have been freed, and allocated again for something else.
            self._now["activations"] += num_bytes - self._sizes[place]
            self._sizes[place] = num_bytes
            return
        places.add(place)
        self._holders[place] = self._holders.get(place, 0) + 1
        if self._holders[place] == 1:
            self._sizes[place] = num_bytes
            self._now["activations"] += num_bytes

    def _release(self, owner: Hashable, place: int) -> None:
        places = self._owned.get(owner, set())
        if place not in places:
            return
        places.discard(place)
        if not places:
            del self._owned[owner]
        self._holders[place] -= 1
        if not self._holders[place]:
            del self._holders[place]
            self._now["activations"] -= self._sizes.pop(place)

    def _mark(self) -> None:
        if sum(self._now.values()) > sum(self._high.values()):
            self._high = dict(self._now)
