"""Bytes that a rank holds, by kind, from what its blocks take and from what the schedule keeps in flight.

A stage holds a microbatch's activations from its forward to its backward; when the backward is split, some of them
until the weight half. Of a block that swaps, only `SWAP_BUFFERS` microbatches are on the device at once: one in use,
and one on its way out or back. Messages are what waits to be sent, and gradients that have arrived.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum

from vpipe.plan.profile import BlockProfile
from vpipe.schedule.action import Kind
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.weights import weight_usage

__all__ = [
    "SWAP_BUFFERS",
    "Policy",
    "RankMemory",
    "StageBytes",
    "StageLoad",
    "held_bytes",
    "rank_memory",
    "stage_bytes",
    "stage_loads",
    "transient_bytes",
]

SWAP_BUFFERS = 2


class Policy(str, Enum):
    """What a block does with its activations between forward and backward."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    SWAP = "swap"


@dataclass(frozen=True)
class StageLoad:
    """What a schedule makes one stage hold at once."""

    held: tuple[tuple[int, int], ...]
    """Microbatches (before their backward, between the halves of a split one): every combination that may be a peak."""
    num_versions: int
    """Parameter sets on the device."""


@dataclass(frozen=True)
class StageBytes:
    """What the blocks of one stage take; activations are those of one microbatch."""

    parameters: int
    optimizer: int
    buffers: int
    messages: int
    held: int
    """From the forward to the backward."""
    swapped: int
    """Of each microbatch that is on the device; the others are in host memory."""
    weight_held: int
    """Between the halves of a split backward."""
    workspace: int


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank at its peak, by kind."""

    parameters: int
    versions: int
    """Older weights that microbatches in flight still need."""
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    """Buffers and frozen parameters of the model, and messages."""
    workspace: int

    @property
    def total(self) -> int:
        """Sum up all kinds."""
        return sum(getattr(self, item.name) for item in fields(self))


def held_bytes(block: BlockProfile, policy: Policy, full: int) -> int:
    """Return what a block holds of `full` microbatches that are between forward and backward."""
    if policy is Policy.SWAP:
        return min(full, SWAP_BUFFERS) * block.activation_bytes
    return full * (block.input_bytes if policy is Policy.RECOMPUTE else block.activation_bytes)


def transient_bytes(block: BlockProfile, policy: Policy) -> int:
    """Return what a block needs for a moment; one that recomputes has all of its activations again by then."""
    again = block.activation_bytes - block.input_bytes if policy is Policy.RECOMPUTE else 0
    return block.workspace_bytes + max(0, again)


def stage_bytes(
    blocks: Sequence[BlockProfile], start: int, stop: int, policies: Sequence[Policy], *, is_ahead: bool = False
) -> StageBytes:
    """Add up blocks `start` to `stop - 1` of a chain; `policies` has one entry per block of the whole chain.

    With `is_ahead` all blocks that recompute do so at once, before the gradient arrives.
    """
    inside = [(blocks[index], policies[index]) for index in range(start, stop)]
    arriving = blocks[start - 1].output_bytes if start else 0
    kept = {Policy.KEEP: "activation_bytes", Policy.RECOMPUTE: "input_bytes"}
    held = sum(getattr(block, kept[policy]) for block, policy in inside if policy in kept)
    needs = [transient_bytes(block, policy) for block, policy in inside]
    own = [block.workspace_bytes for block, _ in inside]
    return StageBytes(
        parameters=sum(block.parameter_bytes for block, _ in inside),
        optimizer=sum(block.optimizer_bytes for block, _ in inside),
        buffers=sum(block.buffer_bytes for block, _ in inside),
        messages=arriving + 2 * blocks[stop - 1].output_bytes,
        held=held + max(0, arriving - blocks[start].input_bytes),  # values that only pass through
        swapped=sum(block.activation_bytes for block, policy in inside if policy is Policy.SWAP),
        weight_held=sum(block.weight_grad_bytes for block, _ in inside),
        workspace=sum(needs) - sum(own) + max(own) if is_ahead else max(needs),
    )


def stage_loads(schedule: Schedule) -> tuple[StageLoad, ...]:
    """Replay each stage's order: what it holds at its peaks.

    Raises:
        ScheduleError: a forward or an update is missing.
    """
    usage = weight_usage(schedule)
    return tuple(StageLoad(_peaks(schedule, stage), usage[stage].num_on_device) for stage in range(schedule.num_stages))


def rank_memory(schedule: Schedule, loads: Sequence[StageLoad], stages: Sequence[StageBytes]) -> tuple[RankMemory, ...]:
    """Return what every rank holds at its peak; `loads` are `stage_loads(schedule)`, `stages` has one entry per stage.

    Where a rank has several stages, their activations peak together, as its order has them.
    """
    memories = []
    held_by: list[dict[int, StageBytes]] = [{} for _ in range(schedule.num_ranks)]
    for stage, item in enumerate(stages):
        held_by[schedule.rank_of(stage)][stage] = item
    for rank, own in enumerate(held_by):
        memories.append(
            RankMemory(
                parameters=sum(item.parameters for item in own.values()),
                versions=sum((loads[stage].num_versions - 1) * item.parameters for stage, item in own.items()),
                gradients=sum(item.parameters for item in own.values()),
                optimizer=sum(item.optimizer for item in own.values()),
                activations=_peak_activations(schedule, rank, loads, stages),
                buffers=sum(item.buffers + item.messages for item in own.values()),
                workspace=max(item.workspace for item in own.values()),
            )
        )
    return tuple(memories)


def _peak_activations(schedule: Schedule, rank: int, loads: Sequence[StageLoad], stages: Sequence[StageBytes]) -> int:
    if schedule.placement.stages_per_rank == 1:
        return max(_activations(stages[rank], full, halves) for full, halves in loads[rank].held)
    counts = dict.fromkeys(schedule.placement.stages_of(rank), (0, 0))
    current = dict.fromkeys(counts, 0)
    total = peak = 0
    for action in schedule.orders[rank]:
        if action.kind not in _CHANGES:
            continue
        stage, (more, waiting) = action.stage, _CHANGES[action.kind]
        full, halves = counts[stage][0] + more, counts[stage][1] + waiting
        counts[stage] = full, halves
        now = _activations(stages[stage], full, halves)
        total += now - current[stage]
        current[stage] = now
        peak = max(peak, total)
    return peak


def _activations(stage: StageBytes, full: int, halves: int) -> int:
    return full * stage.held + min(full, SWAP_BUFFERS) * stage.swapped + halves * stage.weight_held


_CHANGES = {Kind.F: (1, 0), Kind.B: (-1, 0), Kind.I: (-1, 1), Kind.W: (0, -1)}


def _peaks(schedule: Schedule, stage: int) -> tuple[tuple[int, int], ...]:
    """Return the combinations of counts that no other one exceeds."""
    full = halves = 0
    seen = set()
    for action in schedule.stage_order(stage):
        if action.kind in _CHANGES:
            more, waiting = _CHANGES[action.kind]
            full, halves = full + more, halves + waiting
            seen.add((full, halves))
    return tuple(sorted(one for one in seen if not any(one != other and _covers(other, one) for other in seen)))


def _covers(large: tuple[int, int], small: tuple[int, int]) -> bool:
    return large[0] >= small[0] and large[1] >= small[1]
