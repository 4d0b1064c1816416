"""A semaphore between processes: one raises it without a system call, the other one sleeps until it is raised."""

from __future__ import annotations

import ctypes
import mmap
import time

__all__ = ["CACHE_LINE", "Semaphore"]

CACHE_LINE = 64
"""Bytes that a semaphore takes, so that no two are in each other's way."""

# Quick calls keep the interpreter's lock, those that wait let go of it.
_quick, _waiting = ctypes.PyDLL(None), ctypes.CDLL(None)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Semaphore:
    """A POSIX semaphore in shared memory."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self._cell = (ctypes.c_char * CACHE_LINE).from_buffer(memory, offset)
        self._address = ctypes.c_void_p(ctypes.addressof(self._cell))

    def initialise(self, value: int) -> None:
        """Make it one, before anybody uses it."""
        if _quick.sem_init(self._address, 1, value):
            raise OSError("the C library has no semaphores between processes")

    @property
    def value(self) -> int:
        """Return the count."""
        count = ctypes.c_int()
        _quick.sem_getvalue(self._address, ctypes.byref(count))
        return count.value

    def post(self) -> None:
        """Add one, and wake who waits for it."""
        _quick.sem_post(self._address)

    def take(self) -> bool:
        """Take one away if there is one."""
        return bool(_quick.sem_trywait(self._address) == 0)

    def wait(self, seconds: float) -> bool:
        """Take one away; wait so long for it."""
        until = _Timespec(*divmod(time.time_ns() + int(seconds * 1e9), 1_000_000_000))
        return bool(_waiting.sem_timedwait(self._address, ctypes.byref(until)) == 0)
