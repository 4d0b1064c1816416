"""The C library's allocator, told that a training process will want again what it frees."""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
_LARGEST_MMAP_THRESHOLD = 32 << 20
"""glibc takes no larger one; tensors above it are mapped and unmapped one by one."""


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, instead of handing it back to the system; tell whether it does.

    Every microbatch allocates what the one before it freed. Memory that was handed back arrives page by page again,
    each with a fault and zeroed, which took 5 % of a step of real transformer blocks on CPU. Where the C library is
    not glibc, or the environment sets one of its malloc options, nothing is changed.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if chosen or mallopt is None:
        return False
    done = mallopt(_M_TRIM_THRESHOLD, _NEVER), mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    return done == (1, 1)
