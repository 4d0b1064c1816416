"""The families beyond 1F1B: the computed grid, closed forms, and what each of them promises."""

from __future__ import annotations

from typing import Any

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Kind
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.proof.validate import check_schedule
from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.schedule import WeightRule, uses_split_backward
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import Simulation, simulate
from vpipe.schedule.weights import weight_usage

SIZES = [(p, m) for p in range(1, 9) for m in range(1, 17)]
SPLIT = ("zb-h1", "zb-h2", "zb-v", "v-half", "v-min", "dualpipe-v", "searched")

# (p, m): bubble in percent, most and least microbatches held; F = I = W = 1 per rank, half of it per stage of two.
GRID: dict[str, dict[tuple[int, int], tuple[float, float, float]]] = {
    "interleaved": {
        (4, 8): (15.79, 5.5, 2.5),
        (4, 16): (8.57, 5.5, 2.5),
        (8, 16): (17.95, 11.5, 4.5),
        (8, 32): (9.86, 11.5, 4.5),
    },
    "looped-bfs": {(4, 8): (15.79, 8, 8), (4, 16): (8.57, 16, 16), (8, 16): (17.95, 16, 16), (8, 32): (9.86, 32, 32)},
    "zb-h1": {(4, 8): (11.11, 4, 4), (4, 16): (5.88, 4, 4), (8, 16): (12.73, 8, 8), (8, 32): (6.80, 8, 8)},
    "zb-h2": {(4, 8): (11.11, 7, 7), (4, 16): (5.88, 7, 7), (8, 16): (12.73, 15, 15), (8, 32): (6.80, 15, 15)},
    "zb-v": {(4, 8): (5.88, 4, 4), (4, 16): (3.03, 4, 4), (8, 16): (6.80, 8, 8), (8, 32): (3.52, 8, 8)},
    "v-half": {(4, 8): (9.43, 3, 3), (4, 16): (4.95, 3, 3), (8, 16): (15.04, 5, 5), (8, 32): (8.13, 5, 5)},
    "v-min": {(4, 8): (18.64, 2, 2), (4, 16): (10.28, 2, 2), (8, 16): (21.31, 4, 4), (8, 32): (11.93, 4, 4)},
    "dualpipe-v": {
        (4, 8): (5.88, 4.5, 4.5),
        (4, 16): (3.03, 4.5, 4.5),
        (8, 16): (6.80, 8.5, 8.5),
        (8, 32): (3.52, 8.5, 8.5),
    },
}


def _simulate(name: str, p: int, m: int, shares: tuple[float, float, float] = (1, 1, 1), **options: Any) -> Simulation:
    schedule = build_schedule(name, p, m, **options)
    forward, input_grad, weight_grad = shares
    costs = Costs.from_rank_shares(schedule.placement, forward=forward, input_grad=input_grad, weight_grad=weight_grad)
    return simulate(schedule, costs)


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, sizes in GRID.items() for size in sizes])
def test_the_computed_grid(name: str, size: tuple[int, int]) -> None:
    simulation = _simulate(name, *size)
    peaks = simulation.peak_activations
    assert (round(100 * simulation.bubble_fraction, 2), max(peaks), min(peaks)) == GRID[name][size]


@pytest.mark.parametrize("v", [1, 2, 3, 4])
def test_interleaved_keeps_its_closed_form_also_when_m_is_no_multiple_of_p(v: int) -> None:
    for p, m in [*SIZES, (3, 40), (7, 41)]:
        simulation = _simulate("interleaved", p, m, stages_per_rank=v)
        least = m + (p - 1) / v if m >= p else p + (m - 1) / v
        assert simulation.makespan == pytest.approx(3 * least), (p, m)
        if v > 1 and m % p == 0 and m > p:
            assert max(simulation.peak_activations) == pytest.approx(p + (p - 1) / v), (p, m)
        if p <= 4:
            assert check_schedule(simulation.schedule) == [], (p, m)


def test_one_stage_per_rank_makes_the_looped_families_their_parents() -> None:
    for p, m in [(1, 1), (4, 8), (5, 3), (3, 7)]:
        assert build_schedule("interleaved", p, m, stages_per_rank=1).orders == build_schedule("1f1b", p, m).orders
        assert build_schedule("looped-bfs", p, m, stages_per_rank=1).orders == build_schedule("gpipe", p, m).orders


@pytest.mark.parametrize("v", [2, 3])
def test_looped_bfs_divides_the_bubble_of_gpipe_and_holds_as_much(v: int) -> None:
    for p, m in SIZES:
        simulation = _simulate("looped-bfs", p, m, stages_per_rank=v)
        assert check_schedule(simulation.schedule) == [], (p, m)
        assert simulation.peak_activations == pytest.approx((m,) * p)
        if m >= p:
            assert simulation.makespan == pytest.approx(3 * m + 3 * (p - 1) / v), (p, m)


@pytest.mark.parametrize("shares", [(1, 1, 1), (1, 1.2, 0.8), (2, 3, 2)])
def test_zero_bubble_in_closed_form(shares: tuple[float, float, float]) -> None:
    forward, input_grad, weight_grad = shares
    for p in range(2, 9):
        for m in (2 * p - 1, 2 * p, 16, 40):
            if m < 2 * p - 1:
                continue
            h1, h2 = _simulate("zb-h1", p, m, shares), _simulate("zb-h2", p, m, shares)
            idle = (p - 1) * (forward + input_grad - weight_grad)
            assert h1.makespan == pytest.approx(m * sum(shares) + idle), (p, m)
            assert max(h1.peak_activations) == p
            assert h2.makespan <= h1.makespan + 1e-9
            assert max(h2.peak_activations) == 2 * p - 1


def test_zb_h2_and_zb_v_never_idle_between_a_rank_s_start_and_end() -> None:
    for name in ("zb-h2", "zb-v"):
        for p, m in SIZES:
            if m >= 2 * p - 1:
                assert _simulate(name, p, m).span_bubble_fraction == pytest.approx(0), (name, p, m)


def test_split_families_are_never_slower_than_1f1b() -> None:
    for p, m in SIZES:
        slowest = _simulate("1f1b", p, m).makespan
        for name in SPLIT:
            assert _simulate(name, p, m).makespan <= slowest + 1e-9, (name, p, m)
        assert _simulate("zb-h2", p, m).makespan <= _simulate("zb-h1", p, m).makespan, (p, m)


def test_the_vs_reach_the_bound_of_their_placement() -> None:
    for p, m in SIZES:
        bound = 3 * m + (p - 1) / 2  # all work of the last rank, after the way to it
        if m >= 2 * p - 1:
            assert _simulate("zb-v", p, m).makespan == pytest.approx(bound)
        if m >= 2 * p:
            assert _simulate("dualpipe-v", p, m).makespan == pytest.approx(bound)


def test_the_vs_hold_the_same_on_every_rank() -> None:
    for p, m in [(p, m) for p, m in SIZES if m >= 2 * p]:
        assert peak_activations(build_schedule("zb-v", p, m)) == (p,) * p
        assert peak_activations(build_schedule("dualpipe-v", p, m)) == (p + 0.5,) * p


@pytest.mark.parametrize(
    ("name", "share", "peak"),
    [("v-half", 1 / 2, lambda p: (p + 2) // 2), ("v-min", 2 / 3, lambda p: (p + 4) // 3)],
)
def test_v_half_and_v_min_hold_and_idle_as_promised(name: str, share: float, peak: Any) -> None:
    for p, m in [*SIZES, (12, 24), (13, 26)]:
        simulation = _simulate(name, p, m)
        assert max(simulation.peak_activations) <= peak(p), (p, m)
        if m >= p:
            assert simulation.makespan - 3 * m <= share * 3 * (p - 1) + 1e-9, (p, m)
        if m >= 2 * p:
            assert max(simulation.peak_activations) == peak(p), (p, m)


def test_v_half_has_half_of_1f1b_s_bubble_fraction_on_the_grid() -> None:
    for p, m in GRID["v-half"]:
        assert _simulate("v-half", p, m).bubble_fraction <= _simulate("1f1b", p, m).bubble_fraction / 2


@pytest.mark.parametrize("name", ["zb-v", "v-half", "v-min", "dualpipe-v"])
def test_the_vs_say_what_they_need(name: str) -> None:
    schedule = build_schedule(name, 4, 8)
    assert (schedule.placement.style, schedule.num_stages) == ("v", 8)
    with pytest.raises(ScheduleError, match=f"'{name}' holds 2 stages on each rank .* stages_per_rank=3; set it to 2"):
        build_schedule(name, 4, 8, stages_per_rank=3)


def test_split_backwards_are_told() -> None:
    split = [name for name in SCHEDULES if uses_split_backward(build_schedule(name, 4, 8))]
    assert split == list(SPLIT)


def test_pipedream_2bw_is_pipedream_with_several_microbatches_per_update() -> None:
    named = build_schedule("pipedream-2bw", 4, 16, microbatches_per_update=5)
    plain = build_schedule("pipedream", 4, 16, microbatches_per_update=5)
    assert (named.orders, named.weight_rule) == (plain.orders, plain.weight_rule)
    default = build_schedule("pipedream-2bw", 4, 16)
    assert default.orders == build_schedule("pipedream", 4, 16, microbatches_per_update=4).orders
    deep = build_schedule("pipedream-2bw", 4, 16, depths=(6, 4, 2, 0))
    assert sum(action.kind is Kind.STEP for action in deep.orders[0]) == 3  # of 6, 6 and 4 microbatches


def test_pipedream_2bw_keeps_two_versions_and_is_one_update_stale() -> None:
    for p, m in SIZES:
        schedule = build_schedule("pipedream-2bw", p, m)
        assert schedule.weight_rule is WeightRule.DELAYED
        for usage in weight_usage(schedule):
            assert usage.num_versions <= 2, (p, m)
            assert max(usage.staleness) <= 1, (p, m)


def test_pipedream_2bw_says_how_many_microbatches_an_update_needs() -> None:
    for group in (1, 3):
        with pytest.raises(ScheduleError, match=r"too small for 4 ranks .* set microbatches_per_update >= 4"):
            build_schedule("pipedream-2bw", 4, 16, microbatches_per_update=group)
