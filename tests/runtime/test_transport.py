"""What a transport does around a message; that messages arrive is shown by the runs of test_equality and others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from vpipe.runtime.comm.transport import Transport
from vpipe.runtime.comm.waits.activity import Activity


@pytest.mark.parametrize(("wire", "waits"), [("cpu", []), ("cuda", ["arrived"])])
def test_a_rank_is_not_said_to_run_while_only_its_stream_waits(
    wire: str, waits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: told.append("arrived"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    activity = Activity(1, (0, 1))
    parts = {"_announce": told.append, "_wire": torch.device(wire), "_activity": activity, "_groups": {}}
    transport = cast(Any, SimpleNamespace(**parts))
    channel = cast(Any, SimpleNamespace(peer=0, link=(0, 1, True)))
    work = cast(Any, SimpleNamespace(wait=lambda: told.append("wait")))
    Transport._wait(transport, work, "1F3", channel, "waiting for 1F3")
    assert told == ["waiting for 1F3", "wait", *waits, "running"]
    assert activity.wait is None
