"""Ranks with several stages: what they hold together, against trying everything, and limits that are kept."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from functools import cache

import pytest
from plan_toys import random_profile, uniform_profile
from shared_oracle import FAMILIES, Problem, all_cuts, brute_force, problem

from vpipe.errors import PlanError
from vpipe.plan.policy import Policy
from vpipe.plan.recipe import Recipe
from vpipe.planner.explain.explain import explain_lines
from vpipe.planner.profile.profile import LinkProfile
from vpipe.planner.search.limits import needed_limit, usable_bytes
from vpipe.planner.search.search import Request, find_plan, judge_partition, plan_partition
from vpipe.planner.search.setting import Setting
from vpipe.planner.search.situation import Situation

SEEDS = range(24)


@cache
def solved(seed: int) -> tuple[Problem, float, int]:
    found = problem(seed)
    return found, *brute_force(found)


def situations() -> Iterator[tuple[Situation, list[int]]]:
    for seed, name in enumerate(FAMILIES):
        draw = random.Random(seed)
        profile = random_profile(draw, 7, 2)
        setting = Setting(Recipe(name, 4, 2, 2), 1)
        yield Situation.of(profile, setting, [float("inf")] * 2, tuple(Policy), {}), draw.choice(all_cuts(7, 4))


def test_a_rank_is_predicted_as_its_plan_is() -> None:
    for situation, cut in situations():
        shared = situation.shared
        chosen: dict[int, tuple[Policy, ...]] = {}
        ways = [shared.smallest(*each) for each in enumerate(shared.intervals(cut))]
        for rank, way in enumerate(ways):
            chosen |= dict(zip(situation.schedule.placement.stages_of(rank), way.policies, strict=True))
        policies = [policy for stage in range(4) for policy in chosen[stage]]
        assert [memory.most for memory in situation.draft(cut, policies).memory] == [way.num_bytes for way in ways]


@pytest.mark.parametrize("seed", SEEDS)
def test_what_fits_some_way_is_not_refused_and_the_smallest_limit_is_the_smallest(seed: int) -> None:
    found, best, least = solved(seed)
    smallest = find_plan(found.unlimited).smallest_limits[0]
    assert smallest == needed_limit(least)
    plan = find_plan(found.request).best
    assert plan.fits(found.request.usable_limits)
    assert plan.step_ms <= 1.1 * best
    kept = find_plan(found.under(smallest)).best
    assert max(memory.most for memory in kept.memory) == least
    with pytest.raises(PlanError, match="cannot be kept"):
        find_plan(found.under(smallest - 1))


def test_plans_are_near_the_best_of_all() -> None:
    ratios = [find_plan(found.request).best.step_ms / best for found, best, _ in map(solved, SEEDS)]
    assert sum(ratios) / len(ratios) <= 1.01


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_limit_no_cut_is_much_better(name: str) -> None:
    draw = random.Random(name)
    for _ in range(3):
        request = Request(random_profile(draw, 8, 2), 2, 4, (name,), [4], stages_per_rank=2)
        best = min(judge_partition(request, cut).step_ms for cut in all_cuts(8, 4))
        outcome = find_plan(request)
        assert outcome.best.step_ms <= best * 1.01
        assert not outcome.is_exact


@pytest.mark.parametrize("name", ["interleaved", "looped-bfs", "zb-v"])
def test_a_limit_that_the_plan_without_one_keeps_changes_nothing(name: str) -> None:
    # Stages of one rank that need very different bytes, at different times.
    draw = random.Random(name)
    profile = random_profile(draw, 9, 2, rank_speeds=())
    free = find_plan(Request(profile, 2, 4, (name,), [4], stages_per_rank=2)).best
    limit = needed_limit(max(memory.most for memory in free.memory))
    request = Request(profile, 2, 4, (name,), [4], stages_per_rank=2, limits=[limit])
    outcome = find_plan(request)
    assert outcome.best.step_ms <= free.step_ms * 1.001
    assert outcome.smallest_limits[0] <= limit
    assert plan_partition(request, free.partition).policies == free.policies


def test_words_of_limits_that_were_searched_for() -> None:
    request = Request(uniform_profile(8), 2, 4, ("interleaved",), [4], stages_per_rank=2)
    outcome = find_plan(request)
    named = outcome.smallest_limits[0]
    line = explain_lines(outcome)[-1]
    assert line.startswith(f"Smallest limit that can be kept (found; less may do): {named} B per rank")
    assert "because several stages share a rank" in line
    assert "Less cannot" not in line
    with pytest.raises(
        PlanError, match=rf"the smallest that can is {named} bytes \({named} B\) per rank of all that w"
    ):
        find_plan(Request(request.profile, 2, 4, ("interleaved",), [4], stages_per_rank=2, limits=[10]))


def test_a_longer_chain_is_searched_and_keeps_what_it_names() -> None:
    draw = random.Random(1)
    profile = random_profile(draw, 24, 2, rank_speeds=(), host=LinkProfile(0.0, 8.0))
    request = Request(profile, 2, 4, ("interleaved",), [4], stages_per_rank=2)
    outcome = find_plan(request)
    again = [Policy.RECOMPUTE] * 24
    cuts = [outcome.best.partition, outcome.smallest.partition, (6, 6, 6, 6)]
    shown = min(max(item.most for item in judge_partition(request, cut, again).memory) for cut in cuts)
    assert outcome.smallest_limits[0] <= needed_limit(shown)
    limits = [outcome.smallest_limits[0]]
    kept = find_plan(Request(profile, 2, 4, ("interleaved",), [4], stages_per_rank=2, limits=limits)).best
    assert max(memory.most for memory in kept.memory) <= usable_bytes(limits[0])


def test_the_oracle_tries_everything() -> None:
    found = problem(0)
    assert len(all_cuts(5, 4)) == 4
    assert found.request.limits
    best, least = brute_force(found)
    profile = found.request.profile
    policies = list(Policy) if profile.host else [Policy.KEEP, Policy.RECOMPUTE]
    cuts = all_cuts(profile.num_blocks, 4)
    plans = [
        judge_partition(found.unlimited, cut, choice)
        for cut in cuts[:1]
        for choice in itertools.product(policies, repeat=profile.num_blocks)
    ]
    assert least <= min(max(memory.most for memory in plan.memory) for plan in plans)
    assert best <= min((plan.step_ms for plan in plans if plan.fits(found.request.usable_limits)), default=best)
