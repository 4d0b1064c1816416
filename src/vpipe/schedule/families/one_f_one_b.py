"""1F1B, synchronous: a backward as soon as possible after each forward, one update when the pipeline is empty.

Idea: GPipe's bubble with less memory. After a warmup of ``min(p - 1 - s, m)`` forwards, stage s alternates one
forward and one backward, so it never holds more than ``p - s`` microbatches, however many the batch has. A larger
`depths` keeps more in flight to hide the latency of transfers.

Closed form: idle ``(p - 1)(F + B)`` per rank, bubble fraction ``(p - 1)/(m + p - 1)`` with equal stages; rank r
holds ``min(p - r, m)`` microbatches.

Source: PipeDream-Flush in Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", ICML 2021; DAPPLE
(Fan et al., PPoPP 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.families.warmup import one_f_one_b_order, resolve_depths
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule, freeze

__all__ = ["build_1f1b"]


def build_1f1b(num_ranks: int, num_microbatches: int, *, depths: Sequence[int] | None = None) -> Schedule:
    """Build warmup, steady pairs, cooldown and the update; `depths` are the warmup forwards of each stage.

    Raises:
        ScheduleError: `depths` that cannot be run.
    """
    orders = [
        [*one_f_one_b_order(stage, depth, num_microbatches), Action(stage, Kind.STEP, num_microbatches - 1)]
        for stage, depth in enumerate(resolve_depths(depths, num_ranks, num_microbatches))
    ]
    return Schedule("1f1b", num_microbatches, Placement(num_ranks), freeze(orders))
