"""Predicted bytes, against closed forms and against blocks that allocate and free one by one."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from plan_toys import block, random_block

from vpipe.plan.partition import Partition
from vpipe.plan.policy import Policy
from vpipe.planner.cost.loads import SPARE_GRADIENTS, Moment, Replay, stage_loads
from vpipe.planner.cost.memory import RankMemory, rank_memory, stage_bytes
from vpipe.planner.profile.profile import BlockProfile
from vpipe.schedule.action import Kind
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.schedule import Schedule, uses_split_backward
from vpipe.schedule.weights import weight_usage

FAMILIES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "pipedream", "pipedream-2bw")


def predicted(
    schedule: Schedule, blocks: Sequence[BlockProfile], policies: Sequence[Policy], **options: bool
) -> tuple[RankMemory, ...]:
    is_split = uses_split_backward(schedule)
    cut = cuts(schedule, blocks)
    stages = [stage_bytes(blocks, start, stop, policies, is_split=is_split) for start, stop in cut]
    return rank_memory(schedule, stage_loads(schedule, **options), stages)


def cuts(schedule: Schedule, blocks: Sequence[BlockProfile]) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *itertools.accumulate(Partition.uniform(len(blocks), schedule.num_stages))]))


class Allocator:
    """One rank, whose blocks allocate what they hold and need, one after another; it knows no formula."""

    def __init__(self, schedule: Schedule, blocks: Sequence[BlockProfile], policies: Sequence[Policy]) -> None:
        self.blocks, self.policies, self.cut = blocks, policies, cuts(schedule, blocks)
        self.now = self.peak = 0
        self.gradients: set[int] = set()

    def take(self, num_bytes: int) -> None:
        self.now += num_bytes
        self.peak = max(self.peak, self.now)

    def held(self, index: int) -> int:
        item, arriving = self.blocks[index], self.blocks[index - 1].output_bytes if index else 0
        each = item.input_bytes if self.policies[index] is Policy.RECOMPUTE else item.activation_bytes
        is_first = any(start == index for start, _ in self.cut)
        return each + (max(0, arriving - item.input_bytes) if is_first else 0)

    def run(self, kind: Kind, start: int, stop: int) -> None:
        inside = range(start, stop)
        if kind is Kind.F:
            for index in inside:
                again = self.blocks[index].activation_bytes - self.blocks[index].input_bytes
                self.need(self.blocks[index].workspace_bytes)
                self.need(again if self.policies[index] is Policy.RECOMPUTE else 0)
                self.take(self.held(index))
        elif kind is Kind.STEP:
            self.need(max(self.blocks[index].step_workspace_bytes for index in inside))
            self.take(-sum(self.blocks[index].parameter_bytes for index in inside if index in self.gradients))
            self.gradients -= set(inside)
        elif kind is Kind.W:
            for index in reversed(inside):
                self.take(-self.blocks[index].weight_grad_bytes)
                self.add_gradient(index)
        else:
            for index in reversed(inside):
                self.backward(index, is_split=kind is Kind.I)

    def backward(self, index: int, *, is_split: bool) -> None:
        item = self.blocks[index]
        again = item.activation_bytes - item.input_bytes if self.policies[index] is Policy.RECOMPUTE else 0
        self.need(again + item.workspace_bytes)
        self.take(-self.held(index))
        if is_split:
            self.take(item.weight_grad_bytes)
        else:
            self.add_gradient(index)

    def need(self, num_bytes: int) -> None:
        self.take(num_bytes)
        self.take(-num_bytes)

    def add_gradient(self, index: int) -> None:
        if index not in self.gradients:
            self.gradients.add(index)
            self.take(self.blocks[index].parameter_bytes)


def allocated(schedule: Schedule, rank: int, blocks: Sequence[BlockProfile], policies: Sequence[Policy]) -> int:
    """Return the peak of one rank, without messages."""
    allocator, usage = Allocator(schedule, blocks, policies), weight_usage(schedule)
    for stage in schedule.placement.stages_of(rank):
        start, stop = allocator.cut[stage]
        for item in blocks[start:stop]:
            allocator.take(usage[stage].num_versions * item.parameter_bytes + item.optimizer_bytes + item.buffer_bytes)
    for action in schedule.orders[rank]:
        allocator.run(action.kind, *allocator.cut[action.stage])
    return allocator.peak


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(8))
def test_no_rank_needs_more_than_predicted(family: str, seed: int) -> None:
    draw = random.Random(f"{family} {seed}")
    num_ranks = draw.choice([2, 3, 4])
    schedule = build_schedule(family, num_ranks, num_ranks * draw.choice([1, 2, 3]))
    blocks = [random_block(draw) for _ in range(draw.randint(schedule.num_stages, 3 * schedule.num_stages))]
    blocks = [replace(item, step_workspace_bytes=draw.randint(0, 50)) for item in blocks]
    policies = draw.choices([Policy.KEEP, Policy.RECOMPUTE], k=len(blocks))
    memories = predicted(schedule, blocks, policies)
    for rank, memory in enumerate(memories):
        assert allocated(schedule, rank, blocks, policies) <= memory.total


@pytest.mark.parametrize("family", FAMILIES)
def test_without_messages_and_workspace_the_prediction_is_exact(family: str) -> None:
    schedule = build_schedule(family, 4, 8)
    # Activations of which a backward frees more than it makes gradients: its beginning is the peak.
    plain = block(activation_bytes=100, input_bytes=0, output_bytes=0, parameter_bytes=40, weight_grad_bytes=60)
    blocks = [plain] * (2 * schedule.num_stages)
    for rank, memory in enumerate(predicted(schedule, blocks, [Policy.KEEP] * len(blocks))):
        peak = allocated(schedule, rank, blocks, [Policy.KEEP] * len(blocks))
        # Gradients are there from the first input half on, where only weight halves make them.
        assert memory.total - peak in ((0, 80, 160) if uses_split_backward(schedule) else (0,))


def test_in_gpipe_the_first_gradient_comes_when_a_microbatch_has_gone() -> None:
    schedule = build_schedule("gpipe", 2, 6)
    (load, _) = stage_loads(schedule)
    assert [(moment.full, moment.gradients, moment.is_step) for moment in load.moments] == [
        (0, 1, True),
        (5, 1, False),
        (6, 0, False),
    ]
    large = [block(activation_bytes=1000, parameter_bytes=40, output_bytes=0)] * 2
    first, _ = predicted(schedule, large, [Policy.KEEP] * 2)
    assert (first.activations, first.gradients) == (6000, 0)
    small = [block(activation_bytes=1000, parameter_bytes=4000, output_bytes=0)] * 2
    first, _ = predicted(schedule, small, [Policy.KEEP] * 2)
    assert (first.activations, first.gradients) == (5000, 4000)


def test_what_an_update_needs_counts_when_microbatches_are_in_flight() -> None:
    schedule = build_schedule("pipedream", 3, 12)
    blocks = [block(activation_bytes=100, parameter_bytes=400, output_bytes=0, step_workspace_bytes=500)] * 3
    first = predicted(schedule, blocks, [Policy.KEEP] * 3)[0]
    assert (first.activations, first.gradients, first.workspace, first.versions) == (200, 400, 500, 800)


def test_a_block_that_swaps_holds_two_microbatches_and_what_is_too_small_to_move() -> None:
    schedule = build_schedule("gpipe", 1, 8)
    (memory,) = predicted(schedule, [block(activation_bytes=1000, small_bytes=1, parameter_bytes=0)], [Policy.SWAP])
    assert memory.activations == 2 * 999 + 8


@pytest.mark.parametrize("sockets", [False, True])
def test_messages(sockets: bool) -> None:
    blocks = [block(output_bytes=7, input_bytes=7)] * 3
    for family in ("1f1b", "pipedream"):
        memories = predicted(build_schedule(family, 3, 9), [*blocks[:-1], block()], [Policy.KEEP] * 3, sockets=sockets)
        messages = [memory.buffers // 7 for memory in memories]
        # The depths are 3, 2 and 1. Through sockets: three arriving, three leaving, and what is not answered.
        assert messages == ([6, 11, 6] if sockets else [2, 3, 1])
        # Activations: as many as are in flight where they were sent, and one more. Gradients: those that are spare.
        assert [memory.reserve for memory in memories] == ([0, 0, 0] if sockets else [14, 14, 7])
    alone = predicted(build_schedule("1f1b", 1, 4), [block()] * 2, [Policy.KEEP] * 2, sockets=sockets)
    assert alone[0].buffers == 0


def test_while_weight_halves_are_computed_one_microbatch_that_swaps_is_on_the_device() -> None:
    schedule = build_schedule("zb-h2", 2, 6)
    # Of three in flight: in an input half two, and the last one's weight half; in a weight half one and two of those.
    plain = block(activation_bytes=1000, small_bytes=0, output_bytes=0, parameter_bytes=0, weight_grad_bytes=800)
    first, _ = predicted(schedule, [plain] * 2, [Policy.SWAP] * 2)
    assert first.activations == max(2 * 1000, 1000 + 800)
    kept, _ = predicted(schedule, [plain] * 2, [Policy.KEEP] * 2)
    assert kept.activations == max(3 * 1000, 2 * 1000 + 800)


def test_stages_of_a_rank_share_the_way_to_host_memory() -> None:
    schedule = build_schedule("interleaved", 3, 9)
    assert [stage_loads(schedule)[stage].full for stage in (0, 3)] == [6, 3]
    plain = block(activation_bytes=1000, small_bytes=0, output_bytes=0, input_bytes=0, parameter_bytes=0)
    first, *_ = predicted(schedule, [plain] * 6, [Policy.SWAP] * 6)
    assert first.activations == 2 * 1000  # one in use and one on its way, whatever stages they are of


def test_messages_come_back_from_a_stage_that_swaps_them() -> None:
    schedule = build_schedule("gpipe", 2, 8)
    blocks = [block(output_bytes=10, input_bytes=10, activation_bytes=100, parameter_bytes=0, small_bytes=0)] * 2
    first, _ = predicted(schedule, blocks, [Policy.KEEP, Policy.SWAP])
    # One on its way, and those of the two microbatches that the next stage has on its device at once.
    assert first.buffers == 10 * (1 + 2)
    assert first.most == predicted(schedule, blocks, [Policy.KEEP] * 2)[0].most
    few, _ = predicted(build_schedule("gpipe", 2, 2), blocks, [Policy.KEEP, Policy.SWAP])
    assert few.buffers == 10


def test_a_weight_half_recomputes_nothing() -> None:
    schedule = build_schedule("zb-h1", 1, 4)
    sizes = {"activation_bytes": 1000, "input_bytes": 10, "output_bytes": 0, "weight_grad_bytes": 900}
    plain = block(**sizes, parameter_bytes=0, split_workspace_bytes=50)
    # While a block is computed again, the one behind it has left what its weight half needs: that moment is the peak.
    (memory,) = predicted(schedule, [plain] * 2, [Policy.RECOMPUTE] * 2)
    assert memory.total == 900 + 1000 + 50
    (longer,) = predicted(schedule, [plain] * 4, [Policy.RECOMPUTE] * 4)
    assert longer.total == 3 * 900 + 1000 + 50


def test_gradients_wait_in_place_of_activations() -> None:
    schedule = build_schedule("gpipe", 4, 8)
    kept = block(activation_bytes=100, input_bytes=10, output_bytes=10, small_bytes=0, parameter_bytes=0)
    memory = predicted(schedule, [kept] * 4, [Policy.KEEP] * 4)[2]
    # One that is sent on and the spare gradients. At worst the whole batch waits to be taken by the next stage.
    assert memory.buffers == 10 * (1 + SPARE_GRADIENTS)
    assert memory.reserve == 10 * 8
    swapped = predicted(schedule, [kept] * 4, [Policy.SWAP] * 4)[2]
    # With two microbatches on the device whatever is in flight, gradients come on top: six have been sent when two
    # microbatches are left. Of the batch that waits at worst, two are expected, as the next stage swaps, too.
    assert swapped.reserve == 10 * (8 - 2) + 10 * (6 - SPARE_GRADIENTS)


Done = tuple[int, Kind, int]


def needed_before(schedule: Schedule, action: Done) -> set[Done]:
    """Return all computations that are over when `action` begins, whatever the ranks' speeds."""
    orders = {
        stage: [(one.stage, one.kind, one.microbatch) for one in order]
        for order in schedule.orders
        for stage in {one.stage for one in order}
    }
    before: dict[Done, list[Done]] = {}
    for order in orders.values():
        for previous, one in itertools.pairwise(order):
            before.setdefault(one, []).append(previous)
        for stage, kind, microbatch in order:
            others = (stage - 1, (Kind.F,)) if kind is Kind.F else (stage + 1, (Kind.B, Kind.I))
            if kind in (Kind.F, Kind.B, Kind.I):
                found = [(others[0], each, microbatch) for each in others[1]]
                known = [one for one in found if one in orders.get(others[0], ())]
                before.setdefault((stage, kind, microbatch), []).extend(known)
    found, pending = set(), list(before.get(action, ()))
    while pending:
        one = pending.pop()
        if one not in found:
            found.add(one)
            pending += before.get(one, ())
    return found


@pytest.mark.parametrize("family", ["gpipe", "1f1b", "zb-h1", "zb-h2", "pipedream", "interleaved", "zb-v"])
def test_more_gradients_cannot_wait(family: str) -> None:
    schedule = build_schedule(family, 3, 6)
    backward = (Kind.B, Kind.I)
    for stage in range(1, schedule.num_stages):
        if schedule.position_of(stage) == schedule.position_of(stage - 1):
            continue
        replay = Replay(schedule, stage)
        for action in schedule.stage_order(stage):
            moment = replay.begin(action)
            over = needed_before(schedule, (stage, action.kind, action.microbatch))
            sent, read = (sum(one[0] == each and one[1] in backward for one in over) for each in (stage, stage - 1))
            # A gradient is read before its backward begins, which need not be over.
            exact = max(0, sent - read - SPARE_GRADIENTS)
            if schedule.placement.stages_per_rank == 1:
                assert moment.waiting == exact
            else:
                assert moment.waiting >= exact
            replay.end(action)


def bytes_at(moment: Moment, message: int, stale: int, held: int, moved: int, half: int, first: int) -> int:
    """Count what comes and goes on one stage; `first` is what the backward that makes the gradients needs."""
    activations = moment.full * held + moment.copies * moved + moment.halves * half
    return activations + moment.stale * stale + moment.waiting * message + (0 if moment.gradients else first)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_moments_that_are_kept_include_the_peak(family: str) -> None:
    draw = random.Random(family)
    schedule = build_schedule(family, 4, 8)
    for stage, load in enumerate(stage_loads(schedule)):
        replay, moments = Replay(schedule, stage), []
        for action in schedule.stage_order(stage):
            moments.append(replay.begin(action))
            replay.end(action)
        for _ in range(20):
            message, half, first = (draw.randint(0, 50) for _ in range(3))
            # A block that swaps may hold next to nothing of a microbatch that is away, any other at least its input.
            swaps = draw.random() < 0.5
            held = draw.randint(0 if swaps else message, 90)
            figures = message, 0 if swaps else message, held, draw.randint(0, 90), half, first
            most = max(bytes_at(moment, *figures) for moment in moments)
            assert max(bytes_at(moment, *figures) for moment in load.moments) == most
