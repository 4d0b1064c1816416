from __future__ import annotations

import re
from itertools import islice

import numpy as np
import pytest
import torch

from vpipe.data.batches import (
    batch_indices,
    evaluation_batches,
    iterate_batches,
    microbatch_rows,
    num_iterations,
    num_samples_read,
)
from vpipe.errors import ConfigError, DataError


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 4, 2]), (True, [4, 4, 4])])
def test_an_epoch_has_batches_of_different_samples(drop_last: bool, sizes: list[int]) -> None:
    count = num_iterations(14, 4, drop_last=drop_last)
    batches = [batch_indices(1, 0, iteration, 4, 14, drop_last=drop_last) for iteration in range(count)]
    assert [len(batch) for batch in batches] == sizes
    assert len({sample for batch in batches for sample in batch.tolist()}) == sum(sizes)


def test_without_samples_that_are_left_over_nothing_is_dropped() -> None:
    assert num_iterations(12, 4) == num_iterations(12, 4, drop_last=True) == 3


def test_samples_that_are_dropped_get_their_turn_in_other_epochs() -> None:
    batches = iterate_batches(seed=0, num_samples=14, batch_size=4, epochs=10, drop_last=True)
    assert {sample for batch in batches for sample in batch.indices.tolist()} == set(range(14))


@pytest.mark.parametrize(("drop_last", "last"), [(False, 2), (True, 1)])
def test_iterating_goes_through_the_epochs_in_order(drop_last: bool, last: int) -> None:
    places = [
        (batch.epoch, batch.iteration)
        for batch in iterate_batches(seed=0, num_samples=9, batch_size=4, epochs=2, drop_last=drop_last)
    ]
    assert places == [(epoch, iteration) for epoch in range(2) for iteration in range(last + 1)]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_samples", [12, 14])
def test_samples_are_counted_as_they_are_read(num_samples: int, drop_last: bool) -> None:
    batches = islice(iterate_batches(seed=0, num_samples=num_samples, batch_size=4, drop_last=drop_last), 11)
    sizes = [len(batch.indices) for batch in batches]
    for count in range(12):
        assert num_samples_read(count, num_samples, 4, drop_last=drop_last) == sum(sizes[:count])


def test_starting_later_gives_the_same_batches() -> None:
    whole = list(islice(iterate_batches(seed=7, num_samples=10, batch_size=3), 8))
    resumed = list(islice(iterate_batches(seed=7, num_samples=10, batch_size=3, start=5), 3))
    for before, after in zip(whole[5:], resumed, strict=True):
        assert (before.epoch, before.iteration) == (after.epoch, after.iteration)
        assert np.array_equal(before.indices, after.indices)


def test_too_few_samples_for_a_batch() -> None:
    with pytest.raises(
        DataError, match=r"train.batch_size is 8 but the data has 5 samples; use a batch_size of at most 5"
    ):
        num_iterations(5, 8)


@pytest.mark.parametrize(
    ("num_samples", "num_microbatches", "advice"),
    [
        (45, 2, "use a batch_size of at most 44 (2 microbatches), or more data"),
        (45, 5, "use a batch_size of at most 45, or more data"),
        (45, 64, "use at most 45 microbatches, or more data"),
    ],
)
def test_the_advice_fits_the_microbatches(num_samples: int, num_microbatches: int, advice: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"the data has {num_samples} samples; {advice}")):
        num_iterations(num_samples, 64, num_microbatches)


def test_iteration_outside_the_epoch() -> None:
    with pytest.raises(DataError, match="iteration 2 was asked for; an epoch has iterations 0 to 1"):
        batch_indices(0, 0, 2, 4, 9, drop_last=True)
    with pytest.raises(DataError, match="iteration 3 was asked for; an epoch has iterations 0 to 2"):
        batch_indices(0, 0, 3, 4, 9)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one(batch_size: int) -> None:
    with pytest.raises(ConfigError, match="must be at least 1"):
        num_iterations(5, batch_size)


@pytest.mark.parametrize(("num_samples", "sizes"), [(8, [4, 4]), (9, [4, 4, 1]), (3, [3])])
def test_evaluation_reads_every_sample_once_in_order(num_samples: int, sizes: list[int]) -> None:
    batches = list(evaluation_batches(num_samples, 4))
    assert [len(batch) for batch in batches] == sizes
    assert np.concatenate(batches).tolist() == list(range(num_samples))


def test_evaluation_can_stop_early() -> None:
    assert [batch.tolist() for batch in evaluation_batches(9, 2, max_batches=2)] == [[0, 1], [2, 3]]


def test_microbatches_are_in_order_and_differ_by_one_sample_at_most() -> None:
    assert microbatch_rows(6, 3) == (slice(0, 2), slice(2, 4), slice(4, 6))
    assert microbatch_rows(7, 3) == (slice(0, 3), slice(3, 5), slice(5, 7))
    assert microbatch_rows(2, 4) == (slice(0, 1), slice(1, 2), slice(2, 2), slice(2, 2))


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 4, 7, 11])
@pytest.mark.parametrize("batch_size", [1, 2, 6, 7, 23])
def test_they_are_those_of_torch(batch_size: int, num_microbatches: int) -> None:
    rows = torch.arange(batch_size)
    found = [rows[part].tolist() for part in microbatch_rows(batch_size, num_microbatches)]
    assert found == [part.tolist() for part in rows.tensor_split(num_microbatches)]


def test_without_microbatches_nothing_can_be_cut() -> None:
    with pytest.raises(ConfigError, match="num_microbatches is 0; give a whole number of at least 1"):
        microbatch_rows(6, 0)
