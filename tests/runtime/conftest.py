"""What the tests of the runtime share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ranks
    yield
    torch.set_num_threads(before)
