"""Which device a rank takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.backends import cuda as backends

from vpipe.config import RunConfig
from vpipe.workload.device import compute_reproducibly, device_of


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


@pytest.fixture
def _settings_come_back() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    for enable in (backends.enable_flash_sdp, backends.enable_mem_efficient_sdp, backends.enable_cudnn_sdp):
        enable(True)


@pytest.mark.usefixtures("_settings_come_back")
def test_only_a_gpu_is_told_to_compute_reproducibly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    compute_reproducibly(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert backends.mem_efficient_sdp_enabled()
    compute_reproducibly(torch.device("cuda:0"))
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    fused = backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.cudnn_sdp_enabled()
    assert (backends.math_sdp_enabled(), *fused) == (True, False, False, False)
