"""Random numbers as a function of where they are used, so that they do not depend on the partition."""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = [
    "RandomState",
    "derive_seed",
    "derive_seeds",
    "noticing_draws",
    "seed_everything",
    "seeded",
    "seeding_others",
    "seeding_user_code",
]


def derive_seed(*parts: int | str) -> int:
    """Mix `parts` into a 63-bit seed: equal parts give equal seeds on every machine and in every process."""
    # Numbers of other libraries print in other ways, and True equals 1.
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)
    return _number(hashlib.blake2b(repr(plain).encode(), digest_size=8))


def derive_seeds(*parts: int | str, last: Iterable[int]) -> list[int]:
    """Return ``derive_seed(*parts, number)`` for each number of `last`; there is at least one part.

    That is quicker, as what they share is mixed once.
    """
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)
    shared = hashlib.blake2b(repr((*plain, 0))[:-2].encode(), digest_size=8)
    seeds = []
    for number in last:
        mixed = shared.copy()
        mixed.update(b"%d)" % number)
        seeds.append(_number(mixed))
    return seeds


def _number(mixed: hashlib.blake2b) -> int:
    return int.from_bytes(mixed.digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Set the default generators of CPU and, where it is in use, of CUDA."""
    torch.default_generator.manual_seed(seed)
    if _uses_cuda():
        torch.cuda.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block of code under `seed` and leave the default generators as they were."""
    state = RandomState()
    try:
        seed_everything(seed)
        yield
    finally:
        state.restore()


@contextmanager
def seeding_user_code(*parts: int | str) -> Iterator[None]:
    """Run a user's function under the seed of `parts`: as `seeded`, and with it `random` and numpy's global generator.

    What it draws is then the same in every process, but for a generator that it makes itself and does not seed.
    """
    seed = derive_seed(*parts)
    with seeding_others(seed), seeded(seed):
        yield


@contextmanager
def seeding_others(seed: int) -> Iterator[Callable[[], bool]]:
    """Run a block of code with `random` and numpy's global generator under `seed`, and leave them as they were.

    Takes a quarter of a millisecond. Yields a function that tells whether anything has been drawn from them.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state(legacy=False)
    try:
        random.seed(seed)
        np.random.seed(seed % (1 << 32))
        begun = _states_of_others()
        yield lambda: _states_of_others() != begun
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def noticing_draws() -> Iterator[Callable[[], bool]]:
    """Run a block of code and leave all generators as they were; yield a function that tells whether any was used."""
    with seeding_others(0) as drew_others, seeded(0):
        begun = RandomState()
        yield lambda: drew_others() or not begun.is_now()


def _states_of_others() -> bytes:
    return pickle.dumps((random.getstate(), np.random.get_state(legacy=False)))


class RandomState:
    """The state of the default generators at the moment this is made."""

    def __init__(self) -> None:
        # As torch.random.fork_rng does it, which takes several times as long.
        self._cpu = torch.default_generator.get_state()
        self._cuda = torch.cuda.get_rng_state() if _uses_cuda() else None

    def is_now(self) -> bool:
        """Tell whether nothing was drawn since."""
        now = RandomState()
        pairs = ((self._cpu, now._cpu), (self._cuda, now._cuda))
        return all(old is new or (old is not None and new is not None and torch.equal(old, new)) for old, new in pairs)

    def restore(self) -> None:
        """Go back to it."""
        torch.default_generator.set_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)


def _uses_cuda() -> bool:
    # Asking for more than that would start CUDA in a process that may not want it, and this is asked for every block.
    return torch.cuda.is_initialized()  # type: ignore[no-untyped-call,no-any-return]
