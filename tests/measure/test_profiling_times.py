"""What is made of a block's repeats."""

from __future__ import annotations

import pytest

from vpipe.measure.times import Timings, copying_share, summarise_times

STEADY = {
    "forward": 3.0,
    "backward": 7.0,
    "input_grad": 5.0,
    "weight_grad": 3.0,
    "light_forward": 3.5,
    "heavy_backward": 9.0,
    "noting_forward": 3.25,
    "finding_backward": 7.5,
    "empty_forward": 1.0,
    "empty_backward": 1.0,
    "step": 0.5,
    "keeping_step": 0.75,
}
STEADY_REPEATS: Timings = {name: [time] * 4 for name, time in STEADY.items()}


def repeats(**changes: list[float]) -> Timings:
    return {name: changes.get(name, [time] * 4) for name, time in STEADY.items()}


def test_what_a_stage_takes_without_blocks_is_left_out_and_halves_add_up() -> None:
    found = summarise_times([repeats()])
    assert (found.forward_ms, found.step_ms, found.spread) == (2.0, 0.5, 0.0)
    assert found.input_grad_ms + found.weight_grad_ms == pytest.approx(6.0)
    assert found.input_grad_ms == pytest.approx(6.0 * 5 / 8)
    assert found.recompute_ms == pytest.approx(2.5)
    assert found.swap_ms == pytest.approx(0.75)
    assert found.version_ms == 0.25


def test_means_of_all_ranks_count_without_hiccups() -> None:
    ranks = [repeats(forward=[2.0, 2.0, 2.0, 4.0]), repeats(forward=[2.0, 2.0, 2.5, 60.0])]
    assert summarise_times(ranks).forward_ms == pytest.approx(16.5 / 7 - 1)


def test_recomputing_costs_nothing_where_it_takes_no_longer() -> None:
    assert summarise_times([repeats(light_forward=[2.5] * 4, heavy_backward=[7.0] * 4)]).recompute_ms == 0.0
    assert summarise_times([repeats(noting_forward=[2.5] * 4, finding_backward=[7.0] * 4)]).swap_ms == 0.0


def test_what_is_lost_beside_copies_is_that_of_all_ranks() -> None:
    ranks = [
        {"alone": [10.0, 12.0], "beside": [13.0, 13.0], "copied": [4.0, 4.0]},
        {"alone": [11.0, 11.0], "beside": [13.0, 15.0], "copied": [4.0, 6.0]},
    ]
    assert copying_share(ranks) == pytest.approx((2.5, 4.5))
    assert copying_share([STEADY_REPEATS, STEADY_REPEATS]) == (0.0, 0.0)
