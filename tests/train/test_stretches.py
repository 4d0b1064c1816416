"""How runs are cut, and what of them is measured."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from vpipe.train.stretches import Stretch, choose_measured, cut_into_stretches


@pytest.mark.parametrize(
    ("total", "frequency", "expected"),
    [
        (7, 0, [(0, 7)]),
        (7, 3, [(0, 3), (3, 6), (6, 7)]),
        (6, 3, [(0, 3), (3, 6)]),
        (2, 9, [(0, 2)]),
        (2100, 0, [(0, 1000), (1000, 2000), (2000, 2100)]),
        (2100, 1500, [(0, 1000), (1000, 1500), (1500, 2100)]),
    ],
)
def test_stretches_end_where_something_needs_an_empty_pipeline(
    total: int, frequency: int, expected: list[tuple[int, int]]
) -> None:
    assert list(cut_into_stretches(total, frequency)) == expected


@pytest.mark.parametrize(
    ("stretches", "num_filling", "expected"),
    [
        ([(0, 20)], 0, (12, 20)),
        ([(0, 3)], 0, (1, 3)),
        ([(0, 1)], 0, (0, 1)),
        ([(0, 20), (20, 21)], 0, (12, 20)),
        ([(0, 20), (20, 23)], 0, (20, 23)),
        ([(0, 20)], 1, (11, 19)),
        ([(0, 20)], 4, (11, 19)),
        ([(0, 6)], 4, (4, 5)),
        ([(0, 4)], 4, (3, 4)),
        ([(0, 2)], 1, (1, 2)),
        ([(0, 1)], 2, (0, 1)),
        ([(0, 5), (5, 10), (10, 12)], 1, (6, 9)),
        ([(0, 1), (1, 2)], 1, (1, 2)),
    ],
)
def test_late_iterations_of_a_full_pipeline_are_measured(
    stretches: list[tuple[int, int]], num_filling: int, expected: tuple[int, int]
) -> None:
    chosen, measured = choose_measured([Stretch(*stretch) for stretch in stretches], num_filling)
    assert measured == expected
    assert chosen.start <= measured.start < measured.stop <= chosen.stop


@pytest.mark.parametrize(
    ("short", "expected"),
    [((), (12, 20)), ((19,), (12, 19)), ((9, 14, 19), (15, 19)), ((15,), (16, 20)), (range(20), (12, 20))],
)
def test_smaller_batches_are_left_out_where_there_are_others(short: Sequence[int], expected: tuple[int, int]) -> None:
    assert choose_measured([Stretch(0, 20)], 0, lambda iteration: iteration in short)[1] == expected
