"""The plan in words: the numbers that it names are the plan's."""

from __future__ import annotations

from dataclasses import replace

from plan_toys import block, profile_of, uniform_profile

from vpipe.plan.policy import Policy
from vpipe.plan.recipe import Recipe
from vpipe.planner.explain.explain import brief_lines, compare_lines, explain_lines, plan_lines
from vpipe.planner.profile.profile import LinkProfile
from vpipe.planner.search.search import Request, find_plan, judge_partition


def _find(lines: list[str], start: str) -> str:
    return next(line for line in lines if line.strip().startswith(start))


def test_tables_name_what_each_stage_does_and_holds() -> None:
    blocks = [block()] * 7 + [block(forward_ms=3.0, parameter_bytes=500)]
    outcome = find_plan(Request(profile_of(blocks), 2, 8))
    lines = explain_lines(outcome)
    plan = outcome.best
    assert f"partition {list(plan.partition)}" in lines[0]
    assert f"{plan.step_ms:.4g} ms per step" in lines[1]
    row = next(line.split() for line in lines if line.split()[:2] == ["0", "0"])
    assert row[2] == str(plan.partition[0])
    assert row[-2:] == ["all", "kept"]
    assert f"within {outcome.gap:.1%}" in "\n".join(lines)
    memory = plan.memory[1]
    assert any(line.split()[:3] == ["1", str(memory.parameters), "B"] for line in lines)
    assert "parameters" in _find(lines, "rank")
    assert str(sum(outcome.naive["uniform"].partition)) == "8"
    uniform = outcome.naive["uniform"]
    assert f"{uniform.sample_ms / plan.sample_ms - 1:.1%}" in _find(lines, "uniform")


def test_policies_and_their_costs_are_named() -> None:
    profile = uniform_profile(8)
    free = find_plan(Request(profile, 2, 8)).best
    outcome = find_plan(Request(profile, 2, 8, limits=[free.memory[0].total - 1]))
    plan = outcome.best
    lines = "\n".join(explain_lines(outcome))
    count = plan.policies[: plan.partition[0]].count(Policy.RECOMPUTE)
    ahead = ", before the gradient arrives" if 0 in plan.ahead else ""
    assert f"{count} recomputed ({plan.costs.recompute[0]:.4g} ms{ahead})" in lines
    assert "of limit" in lines
    assert f"Smallest limit that can be kept: {outcome.smallest_limits[0]} B per rank" in lines
    swapping = uniform_profile(8, host=LinkProfile(0.0, 100.0))
    request = Request(swapping, 4, 16, limits=[find_plan(Request(swapping, 4, 16)).best.memory[0].total - 1])
    assert "swapped (2 ms on the host link)" in "\n".join(explain_lines(find_plan(request)))
    taking = replace(request, profile=replace(swapping, host_share=0.25))
    assert "swapped (0.5 ms, and 2 ms on the host link)" in "\n".join(explain_lines(find_plan(taking)))


def test_what_moving_weights_costs_is_named() -> None:
    profile = uniform_profile(8, host=LinkProfile(0.0, 40.0), host_share=0.5)
    request = Request(profile, 4, 8, schedules=["pipedream"], options=Recipe(swap_versions=[0]), is_eager=False)
    lines = "\n".join(plan_lines(request, judge_partition(request, [2] * 4)))
    assert "all kept, older weights swapped (2 ms, and 4 ms on the host link)" in lines


def test_microbatches_in_flight_are_told() -> None:
    lines = plan_lines(request := Request(uniform_profile(8), 4, 8), judge_partition(request, [2] * 4))
    head = next(line for line in lines if "in flight" in line)
    end = head.index("in flight") + len("in flight")
    rows = lines[lines.index(head) + 1 :][:4]
    assert [row[:end].split()[-1] for row in rows] == ["4", "3", "2", "1"]


def test_the_compute_cut_gives_a_slow_rank_less() -> None:
    request = Request(uniform_profile(9, rank_speeds=(1.0, 0.3)), 2, 8)
    assert find_plan(request).naive["compute"].partition == (7, 2)
    assert find_plan(Request(uniform_profile(8), 2, 8)).naive["compute"].partition == (4, 4)


def test_what_does_not_fit_is_not_called_fast_and_nothing_is_minus_zero() -> None:
    kept = judge_partition(Request(uniform_profile(8), 2, 8), [4, 4], [Policy.KEEP] * 8)
    request = Request(uniform_profile(8), 2, 8, limits=[int(0.7 * kept.memory[0].most)])
    outcome = find_plan(request)
    large = judge_partition(request, [4, 4], [Policy.KEEP] * 8)
    assert large.sample_ms < outcome.best.sample_ms
    told = compare_lines(outcome, large, "by hand")[-1]
    assert told.startswith("  to fit, the planner would change what ")
    share = outcome.best.sample_ms / large.sample_ms - 1
    assert told.endswith(f"{share:.1%} slower")
    rows = explain_lines(replace(outcome, ranked=(outcome.best, replace(large, step_ms=outcome.best.step_ms - 1e-9))))
    assert not any("-0.0%" in row for row in rows)
    assert not any("does not fit" in row and "%" in row for row in rows)
    assert any("does not fit" in row for row in rows)
    heavy = profile_of([block(parameter_bytes=800), *[block()] * 7])
    least = max(memory.most for memory in judge_partition(Request(heavy, 2, 8), [1, 7], [Policy.RECOMPUTE] * 8).memory)
    tight = find_plan(Request(heavy, 2, 8, limits=[int(1.03 * least)]))
    (uniform,) = (line for line in brief_lines(tight) if line.startswith("Instead, uniform"))
    assert uniform.endswith("ms per step, and it does not fit")


def test_recomputing_ahead_is_a_change_that_is_named() -> None:
    profile = uniform_profile(8)
    request = Request(profile, 4, 8, is_eager=False)
    outcome = find_plan(request)
    again = [Policy.RECOMPUTE] * 8
    plain, ahead = (judge_partition(request, [2] * 4, again, stages) for stages in ((), None))
    assert ahead.ahead
    assert ahead.step_ms < plain.step_ms
    told = compare_lines(replace(outcome, best=ahead), plain, "by hand")[-1]
    stages = " ".join(map(str, ahead.ahead))
    assert told.startswith(f"  the planner would let stages {stages} recompute before the gradient arrives: ")


def test_a_slow_rank_is_named_as_the_bottleneck() -> None:
    outcome = find_plan(Request(uniform_profile(2, rank_speeds=(1.0, 0.25)), 2, 8))
    assert "Bottleneck: stage 1 on rank 1, whose speed is 0.25: 12 ms per microbatch" in "\n".join(
        explain_lines(outcome)
    )


def test_a_partition_by_hand_hears_what_would_change() -> None:
    request = Request(uniform_profile(8), 2, 8, limits=[1500])
    outcome = find_plan(request)
    better = "\n".join(compare_lines(outcome, judge_partition(request, [6, 2]), "by hand"))
    assert f"by hand: [6, 2], {judge_partition(request, [6, 2]).step_ms:.4g} ms per step" in better
    assert "cut into [4, 4]" in better
    assert "faster" in better
    same = "\n".join(compare_lines(outcome, outcome.best, "by hand"))
    assert "the planner finds nothing better" in same
    large = judge_partition(request, [7, 1], [Policy.KEEP] * 8)
    assert "it does not fit: rank 0 needs" in "\n".join(compare_lines(outcome, large, "by hand"))
