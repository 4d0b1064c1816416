"""What torch's C++ side says is kept back for as long as asked, and no longer."""

from __future__ import annotations

import pytest
import torch

from vpipe.runtime.memory.workspace import _on_cpu
from vpipe.runtime.torch_log import _level, errors_only
from vpipe.schedule.action import Action

ACTION = Action.parse("0F0")
NOTE = "Memory block of unknown size"


@pytest.fixture(autouse=True)
def _usual_level(monkeypatch: pytest.MonkeyPatch) -> None:
    level = _level()
    assert level is not None
    monkeypatch.setattr(level, "value", 1)


def test_warnings_are_kept_back_and_come_again_afterwards() -> None:
    level = _level()
    assert level is not None
    with errors_only():
        assert level.value == 2
    assert level.value == 1
    level.value = 0  # TORCH_CPP_LOG_LEVEL=INFO
    with errors_only():
        assert level.value == 0


def test_the_watch_on_the_allocator_warns_of_no_block_that_is_older(capfd: pytest.CaptureFixture[str]) -> None:
    blocks = [torch.empty(1000) for _ in range(3000)]
    _on_cpu(lambda _: blocks.clear(), ACTION)
    assert NOTE not in capfd.readouterr().err
