"""The planner as a whole: what it chooses, what it promises, and what it refuses."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from plan_toys import block, profile_of, random_profile, uniform_profile

from vpipe.errors import PlanError, ScheduleError
from vpipe.plan.policy import Policy
from vpipe.planner.profile.profile import BlockProfile, LinkProfile, Profile, SizeProfile
from vpipe.planner.search.limits import needed_limit, usable_bytes
from vpipe.planner.search.search import Outcome, Request, find_plan, judge_partition


def all_cuts(num_blocks: int, num_stages: int) -> list[list[int]]:
    inner = itertools.combinations(range(1, num_blocks), num_stages - 1)
    return [[stop - start for start, stop in itertools.pairwise([0, *cuts, num_blocks])] for cuts in inner]


def test_equal_blocks_give_the_textbook_plan() -> None:
    outcome = find_plan(Request(uniform_profile(8), num_ranks=4, batch_size=8))
    assert outcome.best.partition == (2, 2, 2, 2)
    assert outcome.best.step_ms == 66.0  # (m + p - 1)(F + B) with F = 2, B = 4
    assert outcome.lower_bound_ms == 66.0
    assert outcome.gap == 0.0
    assert outcome.is_exact
    assert outcome.best.sample_ms == 66.0 / 8


def test_a_heavy_block_gets_a_stage_with_less_beside_it() -> None:
    blocks = [block()] * 9 + [block(forward_ms=4.0)]
    outcome = find_plan(Request(profile_of(blocks), num_ranks=3, batch_size=12))
    assert max(outcome.best.partition) > outcome.best.partition[-1]
    assert outcome.best.step_ms < outcome.naive["uniform"].step_ms


def test_slow_ranks_get_less() -> None:
    outcome = find_plan(Request(uniform_profile(12, rank_speeds=(1.0, 0.5, 1.0)), num_ranks=3, batch_size=30))
    first, slow, last = outcome.best.partition
    assert slow < first
    assert slow < last


@pytest.mark.parametrize("seed", range(25))
def test_no_simulated_cut_is_much_better_and_none_is_below_the_bound(seed: int) -> None:
    draw = random.Random(seed)
    profile = random_profile(draw, 8, 3)
    request = Request(profile, 3, 6, (draw.choice(["1f1b", "gpipe", "zb-h1"]),), is_eager=False)
    outcome = find_plan(request)
    best = min(judge_partition(request, cut).step_ms for cut in all_cuts(8, 3))
    assert outcome.lower_bound_ms <= best * (1 + 1e-9)
    assert best <= outcome.best.step_ms * (1 + 1e-9) <= best * 1.03


@pytest.mark.parametrize("seed", range(25))
def test_an_asynchronous_cut_counts_the_updates_between_computations(seed: int) -> None:
    draw = random.Random(seed)
    profile = random_profile(draw, 8, 3)
    request = Request(profile, 3, 6, (draw.choice(["pipedream", "pipedream-2bw"]),), is_eager=False)
    outcome = find_plan(request)
    best = min(judge_partition(request, cut).step_ms for cut in all_cuts(8, 3))
    assert outcome.lower_bound_ms <= best * (1 + 1e-9)
    assert best <= outcome.best.step_ms * (1 + 1e-9) <= best * 1.01


def test_updates_are_cut_evenly_where_they_take_longest() -> None:
    blocks = [block(step_ms=step, version_ms=0.0) for step in (9.0, 9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)]
    plan = find_plan(Request(profile_of(blocks), 3, 6, ["pipedream"], is_eager=False)).best
    assert plan.partition == (1, 2, 5)
    assert plan.busy_ms == (12.0, 15.0, 15.0)
    assert plan.step_ms == pytest.approx(6 * 15.0)
    synchronous = find_plan(Request(profile_of(blocks), 3, 6, ["1f1b"], is_eager=False)).best
    assert synchronous.busy_ms == synchronous.stage_ms


def test_two_ranks_almost_equally_busy_are_not_predicted_below_the_busier() -> None:
    blocks = [block(forward_ms=time) for time in (5.75, 1.0, 1.0, 6.0)]
    outcome = find_plan(Request(profile_of(blocks), 4, 4, ["pipedream"], is_eager=False))
    assert outcome.best.step_ms == pytest.approx(4 * 3 * 6.0)
    assert outcome.gap == pytest.approx(0.0)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved", "zb-v", "pipedream"])
def test_limits_are_kept_and_cost_time(schedule: str) -> None:
    profile = uniform_profile(16, host=LinkProfile(0.0, 50.0))
    free = find_plan(Request(profile, 4, 8, (schedule,)))
    most = max(memory.total for memory in free.best.memory)
    limit = int(0.75 * most)
    tight = find_plan(Request(profile, 4, 8, (schedule,), limits=[limit]))
    assert all(memory.total <= limit for plan in tight.ranked for memory in plan.memory)
    assert set(tight.best.policies) != {Policy.KEEP}
    assert tight.best.step_ms >= free.best.step_ms
    assert tight.lower_bound_ms <= tight.best.step_ms * (1 + 1e-9)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "pipedream", "zb-h1"])
def test_the_smallest_limit_that_is_named_can_be_kept_and_none_below(schedule: str) -> None:
    draw = random.Random(schedule)
    profile = random_profile(draw, 9, 3, rank_speeds=())
    with pytest.raises(PlanError, match="cannot be kept: the smallest that can is") as caught:
        find_plan(Request(profile, 3, 6, (schedule,), limits=[5]))
    smallest = find_plan(Request(profile, 3, 6, (schedule,))).smallest_limits[0]
    assert f"is {smallest} bytes" in str(caught.value)
    kept = find_plan(Request(profile, 3, 6, (schedule,), limits=[smallest]))
    assert needed_limit(max(memory.most for memory in kept.best.memory)) == smallest
    with pytest.raises(PlanError, match="cannot be kept"):
        find_plan(Request(profile, 3, 6, (schedule,), limits=[smallest - 1]))


def test_one_per_cent_of_a_limit_is_left() -> None:
    assert usable_bytes(10_000) == 9_900
    for num_bytes in (1, 98, 99, 100, 9_900, 123_456_789):
        limit = needed_limit(num_bytes)
        assert usable_bytes(limit) >= num_bytes > usable_bytes(limit - 1)
    profile = uniform_profile(8)
    most = max(memory.most for memory in find_plan(Request(profile, 2, 8)).best.memory)
    kept = find_plan(Request(profile, 2, 8, limits=[needed_limit(most)])).best
    assert set(kept.policies) == {Policy.KEEP}
    tight = find_plan(Request(profile, 2, 8, limits=[most])).best
    assert max(memory.most for memory in tight.memory) <= usable_bytes(most)


def test_limits_per_rank() -> None:
    profile = uniform_profile(8)
    free = find_plan(Request(profile, 2, 8)).best
    limits = [free.memory[0].total - 100, free.memory[1].total + 500]
    tight = find_plan(Request(profile, 2, 8, limits=limits)).best
    assert tight.fits(limits)
    assert tight.step_ms >= free.step_ms
    with pytest.raises(PlanError, match="memory_limit has 3 entries for 2 ranks"):
        find_plan(Request(profile, 2, 8, limits=[1, 2, 3]))
    with pytest.raises(PlanError, match="memory_limit of rank 0 is 0 bytes"):
        find_plan(Request(profile, 2, 8, limits=[0]))


def _sizes(fixed_ms: float) -> Profile:
    """Return a profile of microbatches of 1, 2, 4 and 8 samples, each with a fixed cost beside that of its samples."""
    sizes = [
        SizeProfile(size, (block("a", fixed_ms + size), block("b", fixed_ms + size, output_bytes=0)))
        for size in (1, 2, 4, 8)
    ]
    return Profile("toy", {}, tuple(sizes))


def test_the_number_of_microbatches_weighs_bubble_against_fixed_costs() -> None:
    cheap = find_plan(Request(_sizes(0.0), 2, 16)).best.setting
    dear = find_plan(Request(_sizes(8.0), 2, 16)).best.setting
    assert (cheap.num_microbatches, cheap.microbatch_size) == (16, 1)
    assert dear.num_microbatches < 16
    given = find_plan(Request(_sizes(8.0), 2, 16, num_microbatches=[16])).best.setting
    assert given.num_microbatches == 16
    with pytest.raises(PlanError, match="no number of microbatches cuts a batch of 7"):
        find_plan(Request(replace(_sizes(0.0), sizes=_sizes(0.0).sizes[1:2]), 2, 7))


def test_deeper_warmups_hide_slow_links() -> None:
    profile = uniform_profile(8, link=LinkProfile(2.0, None))
    eager = find_plan(Request(profile, 4, 32))
    plain = find_plan(Request(profile, 4, 32, is_eager=False))
    assert eager.best.setting.recipe.depths is not None
    assert eager.best.step_ms < plain.best.step_ms
    assert eager.best.memory[0].total > plain.best.memory[0].total


def test_the_schedule_is_chosen_too_and_memory_decides_with() -> None:
    names = ("gpipe", "1f1b", "zb-h1", "zb-h2")
    profile = uniform_profile(9)
    free = find_plan(Request(profile, 4, 16, names))
    assert free.best.setting.schedule == "zb-h2"
    limit = max(memory.total for memory in find_plan(Request(profile, 4, 16, ("1f1b",))).best.memory)
    tight = find_plan(Request(profile, 4, 16, names, limits=[limit], policies=(Policy.KEEP,)))
    assert tight.best.setting.schedule == "zb-h1"
    assert free.best.step_ms < tight.best.step_ms


def test_of_equally_fast_plans_the_one_with_less_memory_wins() -> None:
    best = find_plan(Request(uniform_profile(8), 4, 16, ("zb-h2", "gpipe", "zb-h1", "1f1b"))).best
    assert best.setting.schedule == "zb-h1"  # as fast as zb-h2 until the last rank is done


def test_asynchronous_time_is_that_of_the_steady_state() -> None:
    best = find_plan(Request(uniform_profile(8), 4, 8, ("pipedream",))).best
    assert best.step_ms == pytest.approx(8 * 6.0)  # no bubble
    assert [memory.versions for memory in best.memory] == [3 * 80, 2 * 80, 80, 0]


def test_a_partition_by_hand_is_judged_even_where_it_does_not_fit() -> None:
    request = Request(uniform_profile(8), 2, 8, limits=[1000])
    by_hand = judge_partition(request, [6, 2])
    assert by_hand.partition == (6, 2)
    assert math.isfinite(by_hand.step_ms)
    kept = judge_partition(request, [4, 4], [Policy.KEEP] * 8)
    assert not kept.fits(request.rank_limits)
    again = judge_partition(request, [4, 4], [Policy.RECOMPUTE] * 8)
    assert again.step_ms > kept.step_ms
    assert again.memory[0].activations < kept.memory[0].activations
    with pytest.raises(PlanError, match="has 7 blocks in all"):
        judge_partition(request, [4, 3])
    with pytest.raises(PlanError, match="3 policies for 8 blocks"):
        judge_partition(request, [4, 4], [Policy.KEEP] * 3)


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(PlanError, match="2 blocks cannot be cut into 4 stages"):
        find_plan(Request(uniform_profile(2), 4, 8))
    with pytest.raises(PlanError, match="batch of 8 cannot be cut into 3 equal microbatches"):
        find_plan(Request(uniform_profile(8), 2, 8, num_microbatches=[3]))
    with pytest.raises(PlanError, match="rank_speeds of 3 ranks, and the run has 2"):
        find_plan(Request(uniform_profile(8, rank_speeds=(1.0, 1.0, 1.0)), 2, 8))
    with pytest.raises(ScheduleError, match="unknown schedule 'zigzag'"):
        find_plan(Request(uniform_profile(8), 2, 8, ("zigzag",)))


def test_swapping_is_free_as_long_as_the_host_link_keeps_up() -> None:
    profile = uniform_profile(8, host=LinkProfile(0.0, 1000.0))
    kept = find_plan(Request(profile, 4, 16)).best
    limit = kept.memory[0].total - 150
    swapped = find_plan(Request(profile, 4, 16, limits=[limit])).best
    assert Policy.SWAP in swapped.policies
    assert swapped.step_ms == kept.step_ms
    slow = find_plan(Request(replace(profile, host=LinkProfile(0.0, 1.0)), 4, 16, limits=[limit])).best
    assert Policy.SWAP not in slow.policies
    assert slow.step_ms > kept.step_ms


def _same(one: Outcome, other: Outcome) -> bool:
    return one.best == other.best and one.ranked == other.ranked


def test_the_same_request_gives_the_same_plan() -> None:
    request = Request(random_profile(random.Random(4), 12, 3), 3, 8, ("1f1b", "zb-h1"), limits=[700])
    assert _same(find_plan(request), find_plan(request))


def test_stages_recompute_ahead_where_that_saves_time_and_fits() -> None:
    profile = uniform_profile(8)
    free = find_plan(Request(profile, 4, 8)).best
    limits = [free.memory[0].total - 100] * 4
    best = find_plan(Request(profile, 4, 8, limits=limits)).best
    plain = judge_partition(Request(profile, 4, 8, limits=limits), best.partition, best.policies, ahead=())
    assert best.ahead
    assert best.step_ms < plain.step_ms
    assert best.fits(limits)
    # A limit that the recomputed blocks one by one keep, and all at once would not.
    again = [Policy.RECOMPUTE] * 8
    held = max(memory.most for memory in judge_partition(Request(profile, 4, 8), [2, 2, 2, 2], again, ahead=()).memory)
    tight = find_plan(Request(profile, 4, 8, limits=[needed_limit(held)]))
    assert all(memory.total <= held for memory in tight.best.memory)
    assert 0 not in tight.best.ahead


def test_it_recomputes_where_swapping_takes_the_time_of_the_rank() -> None:
    swaps = uniform_profile(8, host=LinkProfile(0.0, 200.0))
    limit = find_plan(Request(swaps, 4, 16)).best.memory[0].total - 1
    counts = {}
    for share in (0.0, 0.5, 2.0):
        plan = find_plan(Request(replace(swaps, host_share=share), 4, 16, limits=[limit])).best
        counts[share] = plan.policies.count(Policy.SWAP), plan.policies.count(Policy.RECOMPUTE)
    # A swapped block is a millisecond on the link, and recomputing it takes one, too.
    assert counts[0.0] == (1, 0)
    assert counts[0.5] == (1, 0)
    assert counts[2.0] == (0, 1)
    handled = replace(swaps, sizes=(replace(swaps.sizes[0], blocks=_handled(swaps.sizes[0].blocks, 1.5)),))
    assert Policy.SWAP not in find_plan(Request(handled, 4, 16, limits=[limit])).best.policies


def _handled(blocks: Sequence[BlockProfile], swap_ms: float) -> tuple[BlockProfile, ...]:
    return tuple(replace(block, swap_ms=swap_ms) for block in blocks)


def test_a_plan_counts_what_moves_take_from_the_rank() -> None:
    profile = uniform_profile(8, host=LinkProfile(0.0, 200.0), host_share=0.5)
    request = Request(profile, 4, 16)
    swapping = judge_partition(request, [2] * 4, [Policy.SWAP] * 8)
    free = judge_partition(Request(replace(profile, host_share=0.0), 4, 16), [2] * 4, [Policy.SWAP] * 8)
    assert swapping.lost_ms == (1.0, 1.0, 0.0, 0.0)  # the last two have no more than two microbatches in flight
    assert [own - other for own, other in zip(swapping.stage_ms, free.stage_ms, strict=True)] == [1.0, 1.0, 0.0, 0.0]
    assert swapping.step_ms > free.step_ms


def test_an_update_costs_more_where_the_weights_before_it_are_still_needed() -> None:
    blocks = [block(step_ms=0.5, version_ms=0.25)] * 4
    request = Request(profile_of(blocks), 2, 8, schedules=["pipedream"], is_eager=False)
    assert judge_partition(request, [2, 2]).costs.step == (1.5, 1.0)
    synchronous = replace(request, schedules=["1f1b"])
    assert judge_partition(synchronous, [2, 2]).costs.step == (1.0, 1.0)
