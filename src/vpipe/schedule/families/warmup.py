"""How far a stage runs ahead: the warmup of 1F1B, with or without updates.

A stage of *depth* d runs d forwards, then pairs of one forward and one backward, then the backwards that are left. So
it has d + 1 microbatches in flight at most. The smallest depth that never idles in the steady state grows towards the
first stage, whose gradients come back last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Action, Kind

__all__ = ["default_depths", "one_f_one_b_order", "resolve_depths"]


def default_depths(ranks_per_stage: Sequence[int]) -> tuple[int, ...]:
    """Return the smallest depth of each stage that keeps 1F1B busy, given how many ranks share each stage.

    With N ranks in all it is ``floor((N - 1 - ranks in earlier stages) / ranks in this stage)`` (PipeDream, SOSP 2019),
    so ``num_stages - 1 - stage`` when no stage is replicated: deepest at stage 0, and 0 at the last stage.

    Raises:
        ScheduleError: a stage has no rank.
    """
    if any(ranks < 1 for ranks in ranks_per_stage):
        raise ScheduleError(f"every stage needs at least 1 rank, got {list(ranks_per_stage)} ranks per stage")
    total, earlier, depths = sum(ranks_per_stage), 0, []
    for ranks in ranks_per_stage:
        depths.append((total - 1 - earlier) // ranks)
        earlier += ranks
    return tuple(depths)


def resolve_depths(depths: Sequence[int] | None, num_stages: int, num_microbatches: int) -> tuple[int, ...]:
    """Check `depths` (one per stage; None: the default) and clamp them to the number of microbatches.

    More than the default is *eager* depth: it hides the latency of transfers and costs memory. Less is legal and
    slower. Depths that grow from one stage to the next are illegal: the later stage would wait for forwards that the
    earlier one only runs after a backward of the later.

    Raises:
        ScheduleError: not one depth per stage, not a whole number from 0 on, or growing.
    """
    if depths is None:
        depths = default_depths([1] * num_stages)
    if len(depths) != num_stages:
        raise ScheduleError(
            f"depths has {len(depths)} entries for {num_stages} stages; give one per stage, first to last"
        )
    for stage, depth in enumerate(depths):
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
            raise ScheduleError(
                f"depths[{stage}] is {depth!r}; a depth is a whole number from 0 on: the warmup forwards of "
                f"stage {stage}, before a forward and a backward take turns"
            )
    clamped = tuple(min(depth, num_microbatches) for depth in depths)
    forwards = [min(depth + 1, num_microbatches) for depth in clamped]  # before the first backward
    for stage in range(1, num_stages):
        if forwards[stage] > forwards[stage - 1]:
            raise ScheduleError(
                f"depths {list(depths)} would deadlock: stage {stage} would wait for {forwards[stage]} forwards before "
                f"its first backward, stage {stage - 1} sends only {forwards[stage - 1]}; depths must not grow from "
                f"one stage to the next, e.g. {list(default_depths([1] * num_stages))}"
            )
    return clamped


def one_f_one_b_order(stage: int, depth: int, num_microbatches: int) -> Iterator[Action]:
    """Yield warmup, steady pairs and cooldown of one stage: forwards and backwards, no update."""
    for microbatch in range(depth):
        yield Action(stage, Kind.F, microbatch)
    for microbatch in range(num_microbatches - depth):
        yield Action(stage, Kind.F, microbatch + depth)
        yield Action(stage, Kind.B, microbatch)
    for microbatch in range(num_microbatches - depth, num_microbatches):
        yield Action(stage, Kind.B, microbatch)
