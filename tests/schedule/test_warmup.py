from __future__ import annotations

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.families.warmup import default_depths, one_f_one_b_order, resolve_depths


def test_depth_is_deepest_at_stage_0_and_zero_at_the_last() -> None:
    assert default_depths([1] * 5) == (4, 3, 2, 1, 0)


@pytest.mark.parametrize(
    ("ranks_per_stage", "depths"),
    [((15, 1), (1, 0)), ((4, 3, 1), (1, 1, 0)), ((1, 3), (3, 0)), ((2, 1, 1), (1, 1, 0)), ((8,), (0,))],
)
def test_replicated_stages_share_the_ranks_behind_them(
    ranks_per_stage: tuple[int, ...], depths: tuple[int, ...]
) -> None:
    assert default_depths(ranks_per_stage) == depths


def test_a_stage_without_ranks_is_an_error() -> None:
    with pytest.raises(ScheduleError, match="every stage needs at least 1 rank"):
        default_depths([2, 0])


def test_depths_are_clamped_to_the_microbatches() -> None:
    assert resolve_depths((6, 4, 2, 0), 4, 3) == (3, 3, 2, 0)
    assert resolve_depths(None, 4, 2) == (2, 2, 1, 0)


def test_depths_that_differ_only_beyond_the_batch_are_legal() -> None:
    # With 4 microbatches, 3 and 4 warmup forwards are the same order.
    assert resolve_depths((3, 4, 0), 3, 4) == (3, 4, 0)


@pytest.mark.parametrize(
    ("depths", "words"),
    [
        ((2, 1), "depths has 2 entries for 3 stages; give one per stage"),
        ((2, -1, 0), r"depths\[1\] is -1; a depth is a whole number from 0 on: the warmup forwards of stage 1, before"),
        ((2, 1, 0.5), r"depths\[2\] is 0.5"),
        ((True, 0, 0), r"depths\[0\] is True"),
        ((1, 2, 0), r"stage 1 would wait for 3 forwards .* stage 0 sends only 2; .* e\.g\. \[2, 1, 0\]"),
    ],
)
def test_illegal_depths_say_what_is_legal(depths: tuple[int, ...], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        resolve_depths(depths, 3, 8)


@pytest.mark.parametrize("depth", [0, 2, 5])
def test_order_is_warmup_pairs_cooldown(depth: int) -> None:
    words = [str(action) for action in one_f_one_b_order(0, depth, 5)]
    assert (
        words
        == {
            0: ["0F0", "0B0", "0F1", "0B1", "0F2", "0B2", "0F3", "0B3", "0F4", "0B4"],
            2: ["0F0", "0F1", "0F2", "0B0", "0F3", "0B1", "0F4", "0B2", "0B3", "0B4"],
            5: ["0F0", "0F1", "0F2", "0F3", "0F4", "0B0", "0B1", "0B2", "0B3", "0B4"],
        }[depth]
    )
