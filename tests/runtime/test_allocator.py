"""Freed memory stays with a training process, unless its environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vpipe.runtime.memory.allocator import keep_freed_memory

COUNT_FAULTS = """
import resource
import sys
import torch
from vpipe.runtime.memory.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for turn in range(12):
    if turn == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1 << 20) for _ in range(12)]  # 48 MiB, as a microbatch's activations
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", COUNT_FAULTS, how]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def test_what_is_freed_does_not_come_back_page_by_page() -> None:
    if _faults("leave") < 50_000:
        pytest.skip("this C library keeps freed memory by itself")
    assert _faults("keep") < 5_000


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000000")]
)
def test_leaves_alone_what_the_environment_has_set(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()
