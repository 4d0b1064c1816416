"""The feed reads each batch once, keeps it as long as it is needed, and moves only what the rank reads."""

from __future__ import annotations

import pytest
import torch

from vpipe.errors import ConfigError, DataError
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

    return BatchFeed(source, num_microbatches, readers, move)


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


def test_a_batch_that_cannot_be_shared_out_is_told():
    with pytest.raises(ConfigError, match="a batch of 5 samples cannot be cut into 2 equal microbatches"):
        feed(batches(5)).rows(0, ["a"])


def test_data_that_ends_early_is_told():
    with pytest.raises(DataError, match="batch 1 was expected but the data ended; give a num_batches that exists"):
        feed(batches(2)).rows(2, ["a"])


def test_batches_of_another_size_are_told():
    with pytest.raises(DataError, match=r"batch 1 has 2 samples and those before it 4; .*drop_last=True"):
        feed(batches(4, 2)).rows(2, ["a"])


def test_a_field_that_is_not_there_is_told():
    with pytest.raises(DataError, match="reads the field 'c', which batch 0 does not have; it has a, b"):
        feed(batches(2), [("a",), ("c",)]).rows(0, ["a"])
