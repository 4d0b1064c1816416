"""What a transport does around a message; that messages arrive is shown by the runs of test_equality and others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from vpipe.runtime.comm.transport import Transport


@pytest.mark.parametrize(("wire", "waits"), [("cpu", []), ("cuda", ["arrived"])])
def test_a_rank_is_not_said_to_run_while_only_its_stream_waits(
    wire: str, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: told.append("arrived"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    transport = cast(Any, SimpleNamespace(_announce=told.append, _wire=torch.device(wire)))
    work = cast(Any, SimpleNamespace(wait=lambda: told.append("wait")))
    Transport._wait(transport, work, "1F3", 0, "waiting for 1F3")
    assert told == ["waiting for 1F3", "wait", *waits, "running"]
