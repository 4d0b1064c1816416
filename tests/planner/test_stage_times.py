"""Cuts with policies under byte limits, against trying everything."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from plan_toys import block, profile_of, random_profile
from planner_oracle import brute_force, planned

from vpipe.plan.policy import Policy
from vpipe.planner.cost.costs import ChainCosts
from vpipe.planner.cost.policies import Frontiers


@pytest.mark.parametrize("seed", range(60))
def test_equals_brute_force(seed: int) -> None:
    expected, found = brute_force(seed), planned(seed)
    assert found == pytest.approx(expected, rel=1e-9) or (math.isinf(found) and math.isinf(expected))


def test_the_seeds_are_no_easy_ones() -> None:
    values = [planned(seed) for seed in range(60)]
    unlimited = [planned(seed, unlimited=True) for seed in range(60)]
    infeasible = sum(math.isinf(value) for value in values)
    costly = sum(math.isfinite(value) and value > free for value, free in zip(values, unlimited, strict=True))
    assert 3 <= infeasible <= 25
    assert costly >= 12


def test_frontier_holds_what_no_combination_beats() -> None:
    draw = random.Random(5)
    profile = random_profile(draw, 5, 1)
    chain = ChainCosts(profile, profile.sizes[0].blocks, split_backward=False)
    frontier = Frontiers(chain, [Policy.KEEP, Policy.RECOMPUTE]).interval(0, 5)
    ways = []
    for choice in itertools.product([False, True], repeat=5):
        pairs = list(zip(chain.blocks, choice, strict=True))
        # On top of what is held when the backward begins; the last block's comes first.
        usually = first = -math.inf
        for item, again in pairs:
            own = item.workspace_bytes + item.output_bytes + (item.activation_bytes - item.input_bytes if again else 0)
            released = item.input_bytes if again else item.activation_bytes
            usually, first = max(own, usually - released), max(own, first - released + item.parameter_bytes)
        ways.append(
            (
                sum(item.recompute_ms for item, again in pairs if again),
                0,
                sum(item.input_bytes if again else item.activation_bytes for item, again in pairs),
                0,
                usually,
                first,
            )
        )
    best = {way for way in ways if not any(other != way and all(map(_at_most, other, way)) for other in ways)}
    assert {tuple(point) for point in frontier.points.tolist()} == best
    assert frontier.is_exact


def _at_most(one: float, other: float) -> bool:
    return one <= other


def test_left_out_ways_are_admitted_and_extremes_stay() -> None:
    draw = random.Random(6)
    profile = random_profile(draw, 14, 1)
    chain = ChainCosts(profile, profile.sizes[0].blocks, split_backward=False)
    policies = [Policy.KEEP, Policy.RECOMPUTE]
    full = Frontiers(chain, policies, 1 << 20).interval(0, 14)
    some = Frontiers(chain, policies, 32).interval(0, 14)
    assert len(some.points) <= 32 < len(full.points)
    assert full.is_exact
    assert not some.is_exact
    assert some.points[:, 2].min() == full.points[:, 2].min()
    assert some.points[:, 0].min() == full.points[:, 0].min()


def test_blocks_that_are_alike_have_few_ways() -> None:
    profile = profile_of([block()] * 40)
    chain = ChainCosts(profile, profile.sizes[0].blocks, split_backward=False)
    frontier = Frontiers(chain, [Policy.KEEP, Policy.RECOMPUTE]).interval(0, 40)
    assert len(frontier.points) == 41
    assert frontier.is_exact
