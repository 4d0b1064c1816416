"""The feed reads each batch once, keeps it as long as it is needed, and moves only what the rank reads."""

from __future__ import annotations

import pytest
import torch

from vpipe.errors import DataError
from vpipe.runtime.batch import Batch
from vpipe.runtime.feed import BatchFeed


def batches(*sizes):
    for number, size in enumerate(sizes):
        rows = torch.arange(size) + 100 * number
        yield Batch({"a": rows, "b": -rows}, size)


def feed(source, readers=(("a",),), num_microbatches=2, moved=None):
    def move(tensor):
        if moved is not None:
            moved.append(tensor)
        return tensor

    return BatchFeed(source, num_microbatches, readers, move, lambda batch, size: {0: (batch.num_samples, size)})


def test_microbatches_are_consecutive_rows_numbered_through_all_batches():
    rows = feed(batches(4, 4))
    assert [rows.rows(serial, ["a"])[0]["a"].tolist() for serial in range(4)] == [
        [0, 1],
        [2, 3],
        [100, 101],
        [102, 103],
    ]
    assert rows.rows(0, [])[1] == 2


def test_batches_are_read_when_they_are_needed_and_dropped_when_all_have_read_them():
    read = []

    def source():
        for number, batch in enumerate(batches(2, 2, 2)):
            read.append(number)
            yield batch

    rows = feed(source(), [("a",), ("a",)])
    rows.rows(0, ["a"])
    assert read == [0]
    rows.rows(2, ["a"])
    assert read == [0, 1]
    for serial in (0, 1, 0):
        rows.done(serial)
    assert rows.rows(1, ["a"])[0]["a"].tolist() == [1]
    rows.done(1)
    assert list(rows._loaded) == [1]


def test_only_what_the_stages_read_is_moved():
    moved = []
    feed(batches(2), [("b",), ("b",), ()], moved=moved).rows(0, ["b"])
    assert [tensor.tolist() for tensor in moved] == [[0, -1]]


def test_microbatches_differ_by_one_sample_at_most_and_the_last_may_have_none():
    rows = feed(batches(5, 2, 3), num_microbatches=3)
    assert [rows.rows(serial, [])[1] for serial in range(9)] == [2, 2, 1, 1, 1, 0, 1, 1, 1]
    assert [serial for serial in range(9) if not rows.has(serial)] == [5]
    assert [rows.count(batch) for batch in range(3)] == [3, 2, 3]


def test_what_crosses_is_asked_for_each_size_and_nothing_crosses_without_samples():
    rows = feed(batches(5, 2), num_microbatches=3)
    assert [rows.crossing(serial) for serial in range(6)] == [
        {0: (5, 2)},
        {0: (5, 2)},
        {0: (5, 1)},
        {0: (2, 1)},
        {0: (2, 1)},
        {},
    ]


def test_batches_that_are_not_here_are_not_known_until_the_lead_allows_it():
    source = batches(2, 2, 2)
    rows = BatchFeed(source, 2, (("a",),), lambda tensor: tensor, lambda batch, size: {}, lead=1)
    assert not rows.knows(2, 0)
    assert rows.knows(2, 1)
    rows.rows(2, ["a"])
    assert [rows.knows(serial, 0) for serial in range(5)] == [True, True, True, True, False]


def test_a_batch_is_dropped_when_those_microbatches_were_read_that_it_has():
    rows = feed(batches(2, 4), num_microbatches=4)
    rows.rows(0, ["a"])
    for serial in (0, 1):
        rows.done(serial)
    assert not rows._loaded


def test_data_that_ends_early_is_told():
    with pytest.raises(DataError, match="batch 1 was expected but the data ended; give a num_batches that exists"):
        feed(batches(2)).rows(2, ["a"])


def test_a_field_that_is_not_there_is_told():
    with pytest.raises(DataError, match="reads the field 'c', which batch 0 does not have; it has a, b"):
        feed(batches(2), [("a",), ("c",)]).rows(0, ["a"])
