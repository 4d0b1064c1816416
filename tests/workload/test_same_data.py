"""Ranks that read different data are refused before they train on a mixture."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_toys import launch_many, write_chain_config

from vpipe.errors import LaunchError


def test_data_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    path = write_chain_config(tmp_path)
    message = (
        r"ranks do not agree on the field 'target' of the training data \(data.entry must seed every generator "
        r"that it makes\): rank 0: 40 samples, checksum \w{8} of the first 4; rank 1: 40"
    )
    with pytest.raises(LaunchError, match=message):
        launch_many(path, 2, {"other": ["data.entry=chain_toys.py:data_of_rank"]})
