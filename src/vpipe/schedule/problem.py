"""What is wrong with a schedule, and where: reasons, and the orders with the bad cells marked."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vpipe.schedule.schedule import Schedule

__all__ = ["Violation", "marked_orders"]

_MARGIN = 6  # cells shown before and after the marked ones
_MAX_RANKS = 24


@dataclass(frozen=True)
class Violation:
    """A reason why a schedule is not legal, with the cells (rank, index in its order) that show it."""

    reason: str
    cells: tuple[tuple[int, int], ...] = ()


def marked_orders(schedule: Schedule, cells: Collection[tuple[int, int]]) -> list[str]:
    """Return one line per rank with its actions in order (not in time), the `cells` marked as ``>>1B0<<``.

    Of long orders only the part around the first marked cell is shown, of many ranks only those from the first marked
    one on.
    """
    first = max(0, min((index for _, index in cells), default=0) - _MARGIN)
    last = first + 2 * _MARGIN + 1
    lines = []
    for rank in _shown_ranks(len(schedule.orders), cells):
        texts = [
            f">>{action}<<" if (rank, first + offset) in cells else str(action)
            for offset, action in enumerate(schedule.orders[rank][first:last])
        ]
        head, tail = "... " if first else "", " ..." if last < len(schedule.orders[rank]) else ""
        lines.append((f"rank {rank}", head, texts, tail))
    width = max((len(text) for _, _, texts, _ in lines for text in texts), default=0)
    return [
        f"{name:<8}| {head}{' '.join(text.ljust(width) for text in texts).rstrip()}{tail}"
        for name, head, texts, tail in lines
    ]


def _shown_ranks(num_ranks: int, cells: Collection[tuple[int, int]]) -> range:
    if num_ranks <= _MAX_RANKS:
        return range(num_ranks)
    first = max(0, min((rank for rank, _ in cells), default=0) - 2)
    return range(first, min(num_ranks, first + _MAX_RANKS))
