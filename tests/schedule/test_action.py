from __future__ import annotations

import pytest

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Action, Kind


@pytest.mark.parametrize("kind", list(Kind))
def test_text_form_reads_back(kind: Kind) -> None:
    action = Action(12, kind, 345)
    assert str(action) == f"12{kind.value}345"
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize("text", ["", "F0", "2F", "2X0", "2f0", "-1F0", "2F0 3F0"])
def test_other_text_is_rejected_with_an_example(text: str) -> None:
    with pytest.raises(ScheduleError, match=r"is not an action; write <stage><kind><microbatch>, e\.g\. 2F0"):
        Action.parse(text)


def test_kinds_hash_like_their_text() -> None:
    assert {Kind.SEND_F: 1}[Kind("SEND_F")] == 1
    assert hash(Kind.F) == hash("F")
