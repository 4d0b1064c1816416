from __future__ import annotations

import numpy as np

from vpipe.data.draws import Stream, raw_draws, uniform_rows


def test_draws_are_the_same_in_every_version() -> None:
    # written down once: a change would change every prepared set and every order of samples
    assert raw_draws(1, Stream.ORDER, 2, 3, 2).tolist() == [13340205042940711710, 8915275729459918570]


def test_each_part_of_the_address_counts() -> None:
    base = raw_draws(1, Stream.ORDER, 2, 3, 4).tolist()
    others = [
        raw_draws(9, Stream.ORDER, 2, 3, 4).tolist(),
        raw_draws(1, Stream.SPLIT, 2, 3, 4).tolist(),
        raw_draws(1, Stream.ORDER, 9, 3, 4).tolist(),
        raw_draws(1, Stream.ORDER, 2, 9, 4).tolist(),
    ]
    seen = {number for row in [base, *others] for number in row}
    assert len(seen) == 20


def test_rows_do_not_depend_on_their_company() -> None:
    together = uniform_rows(0, Stream.MASK_TRAIN, 0, np.array([5, 7, 6]), 10)
    alone = uniform_rows(0, Stream.MASK_TRAIN, 0, np.array([7]), 10)
    assert np.array_equal(together[1], alone[0])


def test_numbers_are_uniform() -> None:
    draws = uniform_rows(0, Stream.SYNTHETIC, 0, np.arange(100), 1000)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert np.abs(np.histogram(draws, bins=10, range=(0, 1))[0] / 10_000 - 1).max() < 0.05
