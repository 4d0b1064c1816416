from __future__ import annotations

import numpy as np
import pytest

from vpipe.data.draws import Stream
from vpipe.data.order import sample_order, shuffled


@pytest.mark.parametrize("num_samples", [1, 2, 100])
def test_order_is_a_permutation(num_samples: int) -> None:
    assert sorted(sample_order(0, 0, num_samples).tolist()) == list(range(num_samples))


def test_order_changes_with_seed_and_epoch_only() -> None:
    order = sample_order(5, 1, 50)
    assert np.array_equal(order, sample_order(5, 1, 50))
    assert not np.array_equal(order, sample_order(6, 1, 50))
    assert not np.array_equal(order, sample_order(5, 2, 50))


def test_other_streams_have_other_orders() -> None:
    assert not np.array_equal(shuffled(0, Stream.SPLIT, 50), sample_order(0, 0, 50))
