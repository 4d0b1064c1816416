from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vpipe.data.source import ArraySource, BatchSource, FieldSpec
from vpipe.errors import DataError


def _source() -> ArraySource:
    return ArraySource({"image": torch.arange(12.0).reshape(4, 3), "target": np.array([3, 2, 1, 0])})


def test_rows_come_in_the_order_asked() -> None:
    batch = _source().batch([2, 0], ["target", "image"])
    assert list(batch) == ["target", "image"]
    assert batch["target"].tolist() == [1, 3]
    assert batch["image"].tolist() == [[6, 7, 8], [0, 1, 2]]


def test_fields_are_described() -> None:
    source = _source()
    assert isinstance(source, BatchSource)
    assert source.num_samples == 4
    assert source.fields == {"image": FieldSpec((3,), torch.float32), "target": FieldSpec((), torch.int64)}
    assert source.fields["image"].shape(2) == (2, 3)


def test_a_batch_is_a_copy() -> None:
    source = _source()
    source.batch([0], ["image"])["image"].zero_()
    source.batch([0], ["target"])["target"].zero_()
    assert source.batch([0], ["image", "target"])["image"].tolist() == [[0, 1, 2]]
    assert source.batch([0], ["target"])["target"].tolist() == [3]


def test_memory_mapped_arrays_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.int16))
    source = ArraySource({"a": np.load(tmp_path / "a.npy", mmap_mode="r")})
    assert source.batch(np.array([5, 1]), ["a"])["a"].tolist() == [5, 1]


@pytest.mark.parametrize("sample", [-1, 4])
def test_sample_outside(sample: int) -> None:
    with pytest.raises(DataError, match=f"sample {sample} was asked for; the data has samples 0 to 3"):
        _source().batch([0, sample], ["target"])


def test_unknown_field() -> None:
    with pytest.raises(DataError, match="no field 'label'; it has image, target"):
        _source().batch([0], ["label"])


def test_fields_of_different_sizes() -> None:
    with pytest.raises(DataError, match="same number of samples, at least 1; got a 2, b 3"):
        ArraySource({"a": torch.zeros(2), "b": torch.zeros(3)})


def test_no_fields() -> None:
    with pytest.raises(DataError, match="got no fields"):
        ArraySource({})


def test_array_of_text() -> None:
    with pytest.raises(DataError, match="cannot become a tensor; use numbers"):
        ArraySource({"a": np.array(["x", "y"])})
