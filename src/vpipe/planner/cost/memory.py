"""Bytes that a rank holds, by kind, from what its blocks take and from what the schedule makes it hold at once.

What its stages hold at any moment is counted by `stage_loads`; the peak is the worst moment. On top of that comes what
an action needs while it runs, for which a backward is followed from the last block to the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from vpipe.plan.policy import Policy
from vpipe.planner.cost.loads import COUNTED, SWAP_BUFFERS, Moment, Replay, StageLoad
from vpipe.planner.profile.profile import BlockProfile
from vpipe.schedule.schedule import Schedule
from vpipe.words.units import format_bytes

__all__ = [
    "RankMemory",
    "StageBytes",
    "Transient",
    "each_bytes",
    "held_bytes",
    "rank_memory",
    "stage_bytes",
    "stage_transient",
    "transient_of",
    "weight_workspace",
]


@dataclass(frozen=True)
class StageBytes:
    """What the blocks of one stage take; activations are those of one microbatch."""

    parameters: int
    optimizer: int
    buffers: int
    arriving: int
    """One message of the cut in front of the stage."""
    leaving: int
    held: int
    """From the forward to the backward."""
    swapped: int
    """Of each microbatch that is on the device; the others are in host memory."""
    moved_message: int
    """A message that arrived, and is needed no more because its content went to host memory."""
    weight_held: int
    """Between the halves of a split backward."""
    transient: Transient
    weight_workspace: int
    """Needed for a moment by a weight half."""
    step_workspace: int


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
    reserve: int = 0
    """How much more it may be when ranks get far ahead of each other and messages wait; no part of the total."""

    @property
    def total(self) -> int:
        """Sum up all kinds."""
        kinds: list[int] = [getattr(self, item.name) for item in fields(self) if item.name != "reserve"]
        return sum(kinds)

    @property
    def most(self) -> int:
        """Return what a limit has to allow."""
        return self.total + self.reserve

    def describe(self) -> str:
        """Name the kinds that are there, largest first, and what has to be free besides."""
        names = [item.name for item in fields(self) if item.name != "reserve"]
        kinds = sorted(((getattr(self, name), name) for name in names), reverse=True)
        parts = ", ".join(f"{kind} {format_bytes(size)}" for size, kind in kinds if size)
        besides = f" and room for {format_bytes(self.reserve)} of messages that may wait" if self.reserve else ""
        return f"{format_bytes(self.total)} ({parts}){besides}"


def each_bytes(block: BlockProfile, policy: Policy) -> tuple[int, int]:
    """Return what a block holds of every microbatch in flight, and of those that are on the device besides."""
    if policy is Policy.SWAP:
        return block.small_bytes, block.activation_bytes - block.small_bytes
    return (block.input_bytes if policy is Policy.RECOMPUTE else block.activation_bytes), 0


def held_bytes(block: BlockProfile, policy: Policy, moment: Moment) -> int:
    """Return what a block holds of all microbatches that are between forward and backward."""
    each, swapped = each_bytes(block, policy)
    return moment.full * each + moment.copies * swapped


class Transient(NamedTuple):
    """Bytes that a stage or a block needs for a moment, on top of what it holds when its backward begins."""

    usually: int
    first: int
    """In the backward that makes the gradients, which stay."""

    def after(self, later: BlockProfile, policy: Policy, *, is_split: bool) -> Transient:
        """Return what is left of it, seen from the beginning of the backward of a later block, which comes first.

        By then that block has released its activations, but for what its weight half needs, and made its gradients.
        """
        released = later.input_bytes if policy is Policy.RECOMPUTE else later.activation_bytes
        if is_split:
            released -= later.weight_grad_bytes
        return Transient(self.usually - released, self.first - released + later.parameter_bytes)


def transient_of(block: BlockProfile, policy: Policy, *, is_split: bool) -> Transient:
    """Return what a block needs for a moment: one that recomputes has all of its activations again by then.

    With it comes the gradient of what the block wrote.
    """
    again = max(0, block.activation_bytes - block.input_bytes) if policy is Policy.RECOMPUTE else 0
    usually, first = block.workspace_bytes, block.first_workspace_bytes or block.workspace_bytes
    if is_split and block.split_workspace_bytes:
        usually = first = block.split_workspace_bytes
    return Transient(usually + again + block.output_bytes, first + again + block.output_bytes)


def weight_workspace(block: BlockProfile) -> int:
    """Return what a block's weight half needs for a moment; its gradients and what waits for it count as held."""
    return block.split_workspace_bytes or block.workspace_bytes


def stage_transient(inside: Iterable[tuple[BlockProfile, Policy]], *, is_split: bool) -> Transient:
    """Return the most that the backward of a stage needs for a moment."""
    most: Transient | None = None
    for block, policy in inside:
        own = transient_of(block, policy, is_split=is_split)
        left = own if most is None else most.after(block, policy, is_split=is_split)
        most = Transient(max(own.usually, left.usually), max(own.first, left.first))
    return most or Transient(0, 0)


def stage_bytes(
    blocks: Sequence[BlockProfile],
    start: int,
    stop: int,
    policies: Sequence[Policy],
    *,
    is_split: bool = False,
    is_ahead: bool = False,
) -> StageBytes:
    """Add up blocks `start` to `stop - 1` of a chain; `policies` has one entry per block of the whole chain.

    With `is_split` backwards come in two halves; with `is_ahead` all blocks that recompute do so at once, before the
    gradient arrives.
    """
    inside = [(blocks[index], policies[index]) for index in range(start, stop)]
    arriving, leaving = blocks[start - 1].output_bytes if start else 0, blocks[stop - 1].output_bytes
    held, swapped = (sum(figures) for figures in zip(*(each_bytes(*pair) for pair in inside), strict=True))
    if is_ahead:
        # By the backward all is there, as if it had been kept.
        again = sum(block.activation_bytes - each_bytes(block, policy)[0] for block, policy in inside) - swapped
        kept = ((block, Policy.KEEP if policy is Policy.RECOMPUTE else policy) for block, policy in inside)
        transient = Transient(*(most + again for most in stage_transient(kept, is_split=is_split)))
    else:
        transient = stage_transient(inside, is_split=is_split)
    return StageBytes(
        parameters=sum(block.parameter_bytes for block, _ in inside),
        optimizer=sum(block.optimizer_bytes for block, _ in inside),
        buffers=sum(block.buffer_bytes for block, _ in inside),
        arriving=arriving,
        leaving=leaving,
        held=held + max(0, arriving - blocks[start].input_bytes),  # values that only pass through
        swapped=swapped,
        moved_message=arriving if policies[start] is Policy.SWAP else 0,
        weight_held=sum(block.weight_grad_bytes for block, _ in inside),
        transient=transient,
        weight_workspace=max(weight_workspace(block) for block, _ in inside),
        # The gradient that arrived last is still there.
        step_workspace=max(block.step_workspace_bytes for block, _ in inside) + leaving,
    )


def rank_memory(schedule: Schedule, loads: Sequence[StageLoad], stages: Sequence[StageBytes]) -> tuple[RankMemory, ...]:
    """Return what every rank holds at its peak; `loads` are `stage_loads(schedule)`, `stages` has one entry per stage.

    Where a rank has several stages, what they hold is added up as its order has it.
    """
    return tuple(_rank_memory(schedule, rank, loads, stages) for rank in range(schedule.num_ranks))


class _Changing(NamedTuple):
    """Bytes that come and go."""

    activations: int
    gradients: int
    messages: int
    workspace: int
    waiting: int
    """Messages that may be there at worst."""

    @property
    def expected(self) -> int:
        """Sum up all but these."""
        return sum(self) - self.waiting


def _rank_memory(schedule: Schedule, rank: int, loads: Sequence[StageLoad], stages: Sequence[StageBytes]) -> RankMemory:
    own = schedule.placement.stages_of(rank)
    held = [(loads[stage], stages[stage]) for stage in own]
    if len(own) == 1:
        (stage,) = own
        moments = [_changing(moment, stages[stage]) for moment in loads[stage].moments]
    else:
        moments = list(_together(schedule, rank, loads, stages))
    peak = max(moments, key=lambda moment: moment.expected)
    leaving = [_num_leaving(stage, loads, stages) for stage in own]
    always = [
        item.moved_message + load.arriving * item.arriving + count * item.leaving
        for (load, item), count in zip(held, leaving, strict=True)
    ]
    return RankMemory(
        parameters=sum(item.parameters for _, item in held),
        versions=sum((load.num_versions - 1) * item.parameters for load, item in held),
        gradients=peak.gradients,
        optimizer=sum(item.optimizer for _, item in held),
        activations=peak.activations,
        buffers=peak.messages + sum(always) + sum(item.buffers for _, item in held),
        workspace=peak.workspace,
        reserve=max(map(sum, moments))
        - peak.expected
        + sum(
            (load.most_arriving - load.arriving) * item.arriving + (load.most_leaving - count) * item.leaving
            for (load, item), count in zip(held, leaving, strict=True)
        ),
    )


def _num_leaving(stage: int, loads: Sequence[StageLoad], stages: Sequence[StageBytes]) -> int:
    """Return how many messages of the cut behind a stage are to be expected on its side.

    Of a next stage that swaps what arrives those come back that it had on the device, when their content has left.
    """
    load = loads[stage]
    swaps = stage + 1 < len(stages) and stages[stage + 1].moved_message > 0 and loads[stage + 1].full > SWAP_BUFFERS
    return min(load.most_leaving, load.leaving + SWAP_BUFFERS) if swaps else load.leaving


def _changing(moment: Moment, stage: StageBytes) -> _Changing:
    if moment.is_step:
        workspace = stage.step_workspace
    elif moment.is_weights:
        workspace = stage.weight_workspace
    else:
        workspace = stage.transient.usually if moment.gradients else stage.transient.first
    return _Changing(
        moment.full * stage.held + moment.copies * stage.swapped + moment.halves * stage.weight_held,
        moment.gradients * stage.parameters,
        moment.stale * (stage.arriving - stage.moved_message),
        workspace,
        moment.waiting * stage.arriving,
    )


def _together(
    schedule: Schedule, rank: int, loads: Sequence[StageLoad], stages: Sequence[StageBytes]
) -> Iterator[_Changing]:
    """Yield what all stages of a rank hold while one of them does something.

    They share the way to host memory, which carries one microbatch at a time.
    """
    own = schedule.placement.stages_of(rank)
    replays = {stage: Replay(schedule, stage, sockets=loads[stage].sockets) for stage in own}
    now = dict.fromkeys(replays, _Changing(0, 0, 0, 0, 0))
    for action in schedule.orders[rank]:
        if action.kind in COUNTED:
            stage = action.stage
            now[stage] = _changing(replays[stage].begin(action), stages[stage])
            activations, gradients, messages, _, waiting = map(sum, zip(*now.values(), strict=True))
            moving = [stages[each].swapped for each, replay in replays.items() if replay.is_moving]
            activations -= sum(moving) - max(moving, default=0)
            yield _Changing(activations, gradients, messages, now[stage].workspace, waiting)
            replays[stage].end(action)
            now[stage] = _changing(replays[stage].rest(), stages[stage])
