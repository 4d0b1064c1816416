from __future__ import annotations

import pytest

from vpipe.errors import PlanError
from vpipe.planner.cost.memory import RankMemory
from vpipe.words.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GiB", 4 * 2**30), ("512 MiB", 2**29), ("1.5GB", 1_500_000_000), ("1000", 1000), (" 3kb ", 3000), ("7B", 7)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1MiB", "1 furlong", "1e3", "1,5GB"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is no size; write a number and a unit"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7 * 2**10, "0.976 MiB"),
        (999.4 * 2**10, "999 KiB"),
        (2**20, "1 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
    ],
)
def test_sizes_are_written(size: float, text: str) -> None:
    assert format_bytes(size) == text


def test_memory_is_named_largest_first() -> None:
    assert RankMemory(10, 0, 10, 20, 300, 0, 5).describe() == (
        "345 B (activations 300 B, optimizer 20 B, parameters 10 B, gradients 10 B, workspace 5 B)"
    )
    assert RankMemory(10, 0, 0, 0, 0, 0, 0, reserve=7).describe() == (
        "10 B (parameters 10 B) and room for 7 B of messages that may wait"
    )
