from __future__ import annotations

from pathlib import Path

import pytest

from vpipe.data.custom import open_source
from vpipe.errors import ConfigError, DataError

CODE = """
from __future__ import annotations
from dataclasses import dataclass
import numpy as np
import helper_of_my_data
from vpipe.data.synthetic import SyntheticBertSource

@dataclass
class Made:
    size: int = 3

def arrays(split, size=3):
    return {"x": np.zeros((Made(size).size, 2)), "y": np.arange(size)} if split == "train" else None

def source(split):
    return SyntheticBertSource(4, sequence_length=8, vocab_size=50)

def wrong(split):
    return [1, 2]

def nothing(split):
    return None

number = 5
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_data.py").write_text(CODE)
    (tmp_path / "helper_of_my_data.py").touch()
    return tmp_path


def test_dictionary_of_arrays(folder: Path) -> None:
    source = open_source("my_data.py:arrays", options={"size": 4}, base=folder)
    assert source is not None
    assert source.num_samples == 4
    assert source.batch([3, 1], ["y"])["y"].tolist() == [3, 1]


def test_source_object(folder: Path) -> None:
    source = open_source(f"{folder}/my_data.py:source", "eval")
    assert source is not None
    assert source.num_samples == 4


def test_nothing_to_evaluate_on(folder: Path) -> None:
    assert open_source("my_data.py:arrays", "eval", base=folder) is None


@pytest.mark.parametrize("name", ["wrong", "nothing"])
def test_something_else_is_returned(folder: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"my_data.py:{name} returned \w+ for split 'train'; return a BatchSource"):
        open_source(f"my_data.py:{name}", base=folder)


def test_entry_that_cannot_be_found(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.entry: 'my_data.py' has no function 'array'; it has .*arrays, source"):
        open_source("my_data.py:array", base=folder)


def test_options_that_do_not_fit(folder: Path) -> None:
    message = (
        "cannot be called as .* with options sise: got an unexpected keyword argument 'sise'; correct data.options"
    )
    with pytest.raises(ConfigError, match=message):
        open_source("my_data.py:arrays", options={"sise": 4}, base=folder)
