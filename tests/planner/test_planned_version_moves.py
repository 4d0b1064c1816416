"""Weight versions in host memory, as the planner sees them: what they free, what they cost, and when it takes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from plan_toys import block, profile_of

from vpipe.errors import PlanError
from vpipe.plan.policy import Policy
from vpipe.plan.recipe import Recipe
from vpipe.planner.explain.explain import explain_lines
from vpipe.planner.profile.profile import LinkProfile, Profile
from vpipe.planner.search.outcome_file import candidate_to_dict
from vpipe.planner.search.search import Outcome, Request, find_plan, judge_partition
from vpipe.planner.search.setting import Setting, settings

FAST, SLOW = LinkProfile(0.0, 1000.0), LinkProfile(0.0, 20.0)


def heavy(host: LinkProfile | None = FAST, num_blocks: int = 8) -> Profile:
    """Return a chain whose weights are most of what is held."""
    return profile_of([block(parameter_bytes=1000)] * num_blocks, host=host)


def request(asked: bool | Sequence[int] | None, limit: int | None = None, **changes: Any) -> Request:
    plain = Request(
        heavy(),
        num_ranks=4,
        batch_size=8,
        schedules=("pipedream",),
        limits=None if limit is None else [limit],
        options=Recipe(swap_versions=asked or ()),
        may_move_versions=asked is None,
        policies=(Policy.KEEP,),
    )
    return replace(plain, **changes)


def versions(outcome: Outcome) -> list[int]:
    return [memory.versions for memory in outcome.best.memory]


def test_a_prediction_counts_what_is_on_the_device() -> None:
    cut = [2, 2, 2, 2]
    kept, moved = judge_partition(request(False), cut), judge_partition(request(True), cut)
    assert [memory.versions for memory in kept.memory] == [6000, 4000, 2000, 0]
    assert [memory.versions for memory in moved.memory] == [2000, 2000, 2000, 0]
    assert moved.step_ms == pytest.approx(kept.step_ms)
    assert moved.setting.moving == (0, 1)
    one = judge_partition(request([1]), cut)
    assert [memory.versions for memory in one.memory] == [6000, 2000, 2000, 0]


def test_a_slow_way_to_host_memory_costs_time() -> None:
    slow = judge_partition(request(True, profile=heavy(SLOW)), [2, 2, 2, 2])
    # 2,000 bytes out and 2,000 back for each microbatch of 6 ms, at 20 bytes per ms.
    assert slow.step_ms == pytest.approx(8 * 2 * 2000 / 20)


def test_the_planner_moves_versions_when_a_limit_needs_that() -> None:
    free, roomy = find_plan(request(None)), find_plan(request(None, 20_000))
    assert free.best.setting.moving == roomy.best.setting.moving == ()
    needed = max(memory.total for memory in free.best.memory)
    tight = find_plan(request(None, needed - 1000))
    assert tight.best.setting.moving == (0, 1)
    assert tight.best.fits([needed - 1000] * 4)
    assert tight.best.step_ms == pytest.approx(free.best.step_ms)
    assert max(versions(tight)) < max(versions(free))
    with pytest.raises(PlanError, match="cannot be kept"):
        find_plan(request(False, tight.smallest_limits[0]))


def test_the_plan_says_what_it_moves() -> None:
    outcome = find_plan(request(True))
    assert "older weights of stages 0 1 in host memory" in "\n".join(explain_lines(outcome))
    content = candidate_to_dict(outcome.best, heavy())
    assert content["swap_versions"] == [0, 1]
    assert json.dumps(content)
    assert "swap_versions" not in candidate_to_dict(find_plan(request(False)).best, heavy())


def found(name: str, asked: bool | Sequence[int] | None, **options: Any) -> list[Setting]:
    base = Recipe(num_ranks=4, swap_versions=asked or (), **options)
    return settings(base, 8, [name], [8], is_eager=False, may_move_versions=asked is None)


def test_only_stages_with_versions_that_wait_are_named() -> None:
    assert [each.moving for each in found("pipedream", None)] == [(), (0, 1)]
    assert [each.moving for each in found("pipedream", [1, 3])] == [(1,)]
    for asked in (None, True, [0, 1]):
        assert [each.moving for each in found("1f1b", asked)] == [()]
        assert [each.moving for each in found("pipedream", asked, macrobatch=True)] == [()]
