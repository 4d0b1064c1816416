"""The smallest limits: kept when they are named, no more than what a plan has shown, and said to be proven or not."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from plan_toys import block, profile_of, random_profile, uniform_profile

from vpipe.errors import PlanError
from vpipe.plan.policy import Policy
from vpipe.planner.cost.costs import ChainCosts
from vpipe.planner.cost.policies import Frontiers
from vpipe.planner.cut.candidates import exchanges, searched_cuts
from vpipe.planner.explain.explain import explain_lines
from vpipe.planner.profile.profile import LinkProfile, Profile
from vpipe.planner.search.limits import needed_limit, usable_bytes
from vpipe.planner.search.search import Request, find_plan, judge_partition, plan_partition


def unequal() -> Profile:
    """Return a chain whose last block needs far more than the others."""
    return profile_of([block()] * 8 + [block(parameter_bytes=5000, optimizer_bytes=10_000)])


def test_of_limits_per_rank_only_those_that_are_too_small_are_raised() -> None:
    request = Request(unequal(), 2, 8, limits=[1 << 30, 3000])
    with pytest.raises(
        PlanError, match=r"cannot be kept: the smallest that can is 1073741824 bytes .*, (\d+) bytes"
    ) as caught:
        find_plan(request)
    named = int(str(caught.value).split("(1 GiB), ")[2].split()[0])
    assert 20_000 < named < 25_000
    kept = find_plan(Request(unequal(), 2, 8, limits=[1 << 30, named])).best
    assert kept.memory[1].most <= usable_bytes(named)
    with pytest.raises(PlanError, match="cannot be kept"):
        find_plan(Request(unequal(), 2, 8, limits=[1 << 30, named - 1]))
    # One number for all stays one number.
    with pytest.raises(PlanError, match=rf"the smallest that can is {named} bytes \(\S+ KiB\) per rank \("):
        find_plan(Request(unequal(), 2, 8, limits=[3000]))


def test_limits_per_rank_of_a_plan_by_hand() -> None:
    request = Request(unequal(), 2, 8, limits=[1 << 30, 3000])
    plan = judge_partition(request, [8, 1], [Policy.KEEP] * 9)
    named = needed_limit(plan.memory[1].most)
    with pytest.raises(PlanError, match=rf"is 1073741824 bytes \(1 GiB\), {named} bytes"):
        plan_partition(request, [8, 1], [Policy.KEEP] * 9)
    assert plan_partition(Request(unequal(), 2, 8, limits=[1 << 30, named]), [8, 1], [Policy.KEEP] * 9)


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
def test_of_a_long_chain_the_smallest_limit_is_kept_and_none_below(schedule: str) -> None:
    draw = random.Random(schedule)
    profile = random_profile(draw, 18, 3, rank_speeds=(), host=LinkProfile(0.0, 8.0))
    outcome = find_plan(Request(profile, 3, 6, (schedule,)))
    smallest = outcome.smallest_limits[0]
    assert smallest <= needed_limit(min(max(item.most for item in plan.memory) for plan in outcome.ranked))
    kept = find_plan(Request(profile, 3, 6, (schedule,), limits=[smallest])).best
    assert max(memory.most for memory in kept.memory) <= usable_bytes(smallest)
    for share in (0.999, 0.99, 0.97):
        with pytest.raises(PlanError, match="cannot be kept"):
            find_plan(Request(profile, 3, 6, (schedule,), limits=[int(share * smallest)]))


def test_what_is_proven_is_said_so_and_what_is_not_is_not() -> None:
    short = find_plan(Request(uniform_profile(8), 2, 8))
    assert short.is_smallest_proven
    assert "Less cannot: rank" in explain_lines(short)[-1]
    draw = random.Random(2)
    profile = random_profile(draw, 40, 2, rank_speeds=(), host=LinkProfile(0.0, 8.0))
    with pytest.raises(PlanError, match=r"per rank of all that were searched \(less may do\)"):
        find_plan(Request(profile, 2, 8, limits=[10]))


def test_a_long_frontier_keeps_what_is_the_same_for_all_blocks() -> None:
    draw = random.Random(6)
    profile = random_profile(draw, 16, 1, host=LinkProfile(0.0, 8.0))
    chain = ChainCosts(profile, profile.sizes[0].blocks, split_backward=False)
    some, full = Frontiers(chain, tuple(Policy), 32), Frontiers(chain, tuple(Policy), 256)
    for place, policy in enumerate(Policy):
        alone = Frontiers(chain, (policy,)).interval(0, 16).points[0]
        for frontiers in (some, full):
            frontier = frontiers.interval(0, 16)
            assert (frontier.points[frontier.alike[place]] <= alone).all()
    assert not some.interval(0, 16).is_exact


def test_cuts_of_long_chains_are_searched_from_all_seeds() -> None:
    weights = np.arange(40.0)

    def cost(cut: list[int]) -> tuple[float, ...]:
        ends = [0, *itertools.accumulate(cut)]
        sums = [float(weights[start:stop].sum()) for start, stop in itertools.pairwise(ends)]
        return max(sums), sum(each * each for each in sums)

    seeds = [[37, 1, 1, 1], [10, 10, 10, 10]]
    ranked = searched_cuts(cost, seeds, 40, 4, 400)
    assert ranked[0][0] < min(map(cost, seeds))
    assert ranked[0][0][0] < 1.1 * weights.sum() / 4
    assert all(sum(cut) == 40 and min(cut) > 0 for _, cut in ranked)
    every = searched_cuts(cost, [], 6, 3, 10)
    assert len(every) == 10
    assert every == sorted(every)


def test_exchanges_change_one_block_or_two_of_a_rank() -> None:
    keep, again = Policy.KEEP, Policy.RECOMPUTE
    found = set(exchanges((keep, again, keep), (0, 0, 1), (keep, again)))
    assert found == {(again, again, keep), (keep, keep, keep), (keep, again, again), (again, keep, keep)}
