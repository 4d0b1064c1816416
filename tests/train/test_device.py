"""Which device a rank takes."""

from __future__ import annotations

import pytest
import torch

from vpipe.config import RunConfig
from vpipe.train.device import device_of


def run(**launch: object) -> RunConfig:
    return RunConfig.model_validate({"launch": {"machines": ["localhost:3", "localhost:1"], **launch}})


def test_a_rank_takes_the_gpu_that_its_machine_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("RANK", "1")
    assert device_of(run()) == device_of(run(device="cuda")) == "cuda:1"
    monkeypatch.delenv("RANK")
    assert device_of(run()) == "cuda:3"
    assert device_of(run(machines=[])) == "cuda"
    assert device_of(run(device="cpu")) == "cpu"


def test_without_a_gpu_machines_only_count_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(run()) == "cpu"
