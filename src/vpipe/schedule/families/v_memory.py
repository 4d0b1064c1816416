"""V-Half and V-Min: a V of stages that holds half, or a third, of what 1F1B holds.

Idea: what a rank holds is how long each microbatch lives on it, over how often one comes. So fix the life of one
microbatch first (its *block*: when each stage runs F and I, in slots of one stage's F = I = W), and repeat the block
every 6 slots, the work of two stages. On a V, a stage's long life on the way down shares its rank with a short one on
the way up, so the memory is the same on every rank. Two blocks:

- **V-Min**: forwards and input gradients go straight through, a slot per stage: the shortest life there is.
- **V-Half**: two slots per stage on the way down and back, so that the blocks leave fewer gaps at both ends.

Repetition alone leaves gaps where the first blocks have no predecessors and the last no successors. There, actions are
pulled earlier as far as their inputs and the memory of the steady state allow; weight gradients fill what is left.

Closed form: holds ``(p + 2)//2`` (V-Half) and ``(p + 4)//3`` (V-Min) microbatches; idle time at most a half, and two
thirds, of 1F1B's for m >= p when F = I = W. V-Min stalls where these differ. Twice 1F1B's traffic.

Source: Qi et al., "Pipeline Parallelism with Controllable Memory", NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vpipe.schedule.action import Action, Kind
from vpipe.schedule.families.order import require_two_stages
from vpipe.schedule.families.slots import SlotGrid
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule

__all__ = ["build_v_half", "build_v_min"]

_PERIOD = 6  # slots: F, I and W of two stages


@dataclass(frozen=True)
class _Block:
    """The slots in which one microbatch runs on one rank."""

    down_forward: int
    up_forward: int
    up_backward: int
    down_backward: int


def build_v_half(num_ranks: int, num_microbatches: int, *, stages_per_rank: int = 2) -> Schedule:
    """Build the V that holds half of 1F1B's memory; two stages on each rank.

    Raises:
        ScheduleError: another number of stages per rank.
    """
    require_two_stages("v-half", stages_per_rank)
    # With an even number of ranks two actions of a rank would meet in one slot of the period; so pause at the V's end.
    pause = 3 if num_ranks % 2 == 0 else 0

    def block(rank: int) -> _Block:
        back = 3 * num_ranks + pause - 1 + 2 * rank
        return _Block(2 * rank, 3 * num_ranks - 2 - rank, back, 6 * num_ranks + pause - 2 - rank)

    return _repeat("v-half", num_ranks, num_microbatches, block)


def build_v_min(num_ranks: int, num_microbatches: int, *, stages_per_rank: int = 2) -> Schedule:
    """Build the V that holds a third of 1F1B's memory; two stages on each rank.

    Raises:
        ScheduleError: another number of stages per rank.
    """
    require_two_stages("v-min", stages_per_rank)
    pause = 2 if num_ranks % 3 == 0 else 0  # as above, for multiples of 3

    def block(rank: int) -> _Block:
        last = 2 * num_ranks - 1
        return _Block(rank, last - rank, last + 1 + pause + rank, 2 * last + 1 + pause - rank)

    return _repeat("v-min", num_ranks, num_microbatches, block)


def _repeat(name: str, num_ranks: int, num_microbatches: int, block: Callable[[int], _Block]) -> Schedule:
    """Run a block every period and close the gaps."""
    placement = Placement(num_ranks, 2, "v")
    grid = SlotGrid(placement)
    for rank in range(num_ranks):
        down, up = placement.stages_of(rank)
        slots = block(rank)
        for microbatch in range(num_microbatches):
            late = _PERIOD * microbatch
            grid.place(Action(down, Kind.F, microbatch), slots.down_forward + late)
            grid.place(Action(up, Kind.F, microbatch), slots.up_forward + late)
            grid.place(Action(up, Kind.I, microbatch), slots.up_backward + late)
            grid.place(Action(down, Kind.I, microbatch), slots.down_backward + late)
    grid.fill_weight_gradients()
    grid.close_gaps()
    orders = tuple(
        (*order, *(Action(stage, Kind.STEP, num_microbatches - 1) for stage in reversed(placement.stages_of(rank))))
        for rank, order in enumerate(grid.orders())
    )
    return Schedule(name, num_microbatches, placement, orders)
