"""Random instances: unequal ranks and a memory limit. The same number is the same instance everywhere."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from vpipe.schedule.search.search import SearchRequest
from vpipe.schedule.search.searched import make_request

__all__ = ["MILLI", "Instance", "draw"]

MILLI = 1000
"""Times are multiples of a thousandth, so that a solver of whole numbers sees the same instance."""


@dataclass(frozen=True)
class Instance:
    """Ranks, microbatches, each rank's times within 50 % of 1, and microbatches that any rank may hold."""

    number: int
    num_ranks: int
    num_microbatches: int
    limit: float
    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]

    def request(self, stages_per_rank: int | None) -> SearchRequest:
        """Return what is searched for."""
        return make_request(
            self.num_ranks,
            self.num_microbatches,
            stages_per_rank=stages_per_rank,
            max_in_flight=self.limit,
            forward=self.forward,
            input_grad=self.input_grad,
            weight_grad=self.weight_grad,
        )

    def facts(self) -> dict[str, Any]:
        """Return what a table needs to know."""
        return {
            "number": self.number,
            "num_ranks": self.num_ranks,
            "num_microbatches": self.num_microbatches,
            "limit": self.limit,
        }


def draw(number: int, most_ranks: int, most_microbatches: int) -> Instance:
    """Draw an instance; its limit lies between half and twice the ranks, but never below the 1 that any order needs."""
    source = random.Random(f"searched {number} {most_ranks} {most_microbatches}")
    num_ranks, num_microbatches = source.randint(1, most_ranks), source.randint(1, most_microbatches)
    limit = max(1.0, round(source.uniform(num_ranks / 2, 2 * num_ranks), 2))
    times = [tuple(source.randint(MILLI // 2, 3 * MILLI // 2) / MILLI for _ in range(num_ranks)) for _ in range(3)]
    return Instance(number, num_ranks, num_microbatches, limit, *times)
