"""Who can be known to wait for ever: decided from sightings, in no process but this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest

from vpipe.errors import ExecutionError
from vpipe.runtime.comm.waits.activity import CLOSED, EVERYTHING, Activity, Begun, LastCall, Meeting, Place, Wait
from vpipe.runtime.comm.waits.sighting import Sighting, Verdict, name_place
from vpipe.runtime.comm.waits.verdict import describe_wait, different_calls, judge

NOW = 1000.0


def meeting(rank: int, others: tuple[int, ...], number: int, key: str = "evaluate: plans") -> Sighting:
    """Return a rank that waits for all in its meeting of this number."""
    call, _, what = key.partition(": ")
    wait = Wait(what, others, NOW - 3, number)
    return Sighting(rank, 1, Place(call, NOW - 4, 0), wait=wait, meetings=(Meeting(number, key),), lasts=True)


def message(rank: int, peer: int, number: int, num_meetings: int = 0, **more: Any) -> Sighting:
    """Return a rank that waits for a message in its training program of this number."""
    return Sighting(
        rank,
        1,
        Place("train", NOW - 4, 0, 0, number - 1),
        wait=Wait("1B0", (peer,), NOW - 3),
        meetings=(Meeting(num_meetings, "train: plans"),),
        programs={0: Begun(number, "training")},
        lasts=True,
        **more,
    )


def idle(rank: int, num_meetings: int = 0, number: int = 0, **more: Any) -> Sighting:
    programs = {0: Begun(number, "training")} if number else {}
    place = Place("", NOW - 60)
    meetings = (Meeting(num_meetings, "train: plans"),)
    return Sighting(rank, 1, place, meetings=meetings, programs=programs, lasts=True, **more)


def judged(*seen: Sighting, waiting: set[int] | None = None) -> list[tuple[int, ...] | None]:
    """Return for each rank whose waits it finds to last for ever."""
    by_rank = {item.rank: item for item in seen}
    known = {rank for rank, item in by_rank.items() if item.wait is not None} if waiting is None else waiting
    verdicts = [judge(rank, by_rank, known, NOW) for rank in by_rank]
    return [None if verdict is None else verdict.ranks for verdict in verdicts]


def test_a_meeting_and_a_message_of_a_program_that_the_other_has_not_begun_are_for_ever() -> None:
    assert judged(meeting(0, (1,), 5), message(1, 0, 4, num_meetings=4)) == [(0, 1)] * 2


def test_messages_of_one_program_may_be_on_their_way() -> None:
    assert judged(message(0, 1, 4), message(1, 0, 4)) == [None, None]
    assert judged(message(0, 1, 4), message(1, 0, 5)) == [None, None]


def test_a_rank_that_has_come_to_the_meeting_is_not_waited_for() -> None:
    assert judged(meeting(0, (1,), 5), meeting(1, (0,), 5)) == [None, None]
    assert judged(meeting(0, (1,), 5, "train: plans"), message(1, 0, 4, num_meetings=5)) == [None, None]


def test_a_meeting_for_something_else_is_for_ever() -> None:
    assert judged(meeting(0, (1,), 5), meeting(1, (0,), 5, "close: the end")) == [(0, 1)] * 2
    passed = replace(idle(1), meetings=(Meeting(5, "train: weights"), Meeting(6, "train: the loss")))
    assert judged(meeting(0, (1,), 5), passed) == [(0,), None]


def test_another_program_of_the_same_number_is_for_ever() -> None:
    other = replace(message(1, 0, 4), programs={0: Begun(4, "evaluation")})
    assert judged(message(0, 1, 4), other) == [(0, 1)] * 2


@pytest.mark.parametrize("seconds", [1.0, 100_000.0])
def test_a_rank_in_its_own_code_may_be_slow_for_ever(seconds: float) -> None:
    slow = replace(idle(1, num_meetings=4, number=3), place=Place("", NOW - seconds))
    assert judged(meeting(0, (1,), 5), slow) == [None, None]
    assert judged(message(0, 1, 4), slow) == [None, None]


def test_a_wait_that_is_not_known_to_last_proves_nothing() -> None:
    assert judged(meeting(0, (1,), 5), message(1, 0, 4, num_meetings=4), waiting={0}) == [None, None]


@pytest.mark.parametrize(
    ("own", "last", "is_sure"),
    [
        (3, LastCall(Place("train", NOW, 0, 0, 2), "ended"), True),
        (3, LastCall(Place("train", NOW, 0, 0, 2), "left"), False),  # a caller that went out of its loop may go on
        (3, LastCall(Place("train", NOW, 0, 1, 1), "ended"), False),  # another train than the one that waits
        (3, LastCall(Place("train", NOW, 1, 0, 2), "ended"), False),  # of another pipeline
        (3, LastCall(Place("step", NOW, 0, 0, 1), "ended"), False),
        (2, LastCall(Place("train", NOW, 0, 0, 2), "ended"), False),  # as many
    ],
)
def test_a_train_of_fewer_batches_is_known_by_where_it_began(own: int, last: LastCall, is_sure: bool) -> None:
    expected = (0,) if is_sure else None
    assert judged(message(0, 1, own), idle(1, number=2, last=last)) == [expected, None]


def test_a_rank_that_failed_is_waited_for_a_little_longer_in_the_program_in_which_it_failed() -> None:
    failed = idle(1, number=4, ended={0: "ValueError: no"})
    assert judged(message(0, 1, 4), failed) == [(0,), None]
    assert judged(message(0, 1, 4), replace(failed, place=Place("", NOW - 1))) == [None, None]
    assert judged(message(0, 1, 5), replace(failed, place=Place("", NOW - 1))) == [(0,), None]


def test_what_ended_another_pipeline_is_no_reason() -> None:
    assert judged(message(0, 1, 4), idle(1, number=3, ended={7: "ValueError: no"})) == [None, None]
    assert judged(message(0, 1, 4), idle(1, number=3, ended={EVERYTHING: "ValueError: no"})) == [(0,), None]


def test_a_pipeline_that_was_closed_has_sent_all_that_it_had() -> None:
    assert judged(message(0, 1, 4), idle(1, number=4, ended={0: CLOSED})) == [None, None]
    assert judged(message(0, 1, 5), idle(1, number=4, ended={0: CLOSED})) == [(0,), None]


def test_ranks_that_only_wait_for_stuck_ones_are_named_where_that_is_certain() -> None:
    first = message(0, 1, 4)
    second, third = message(1, 2, 4, num_meetings=4), meeting(2, (0, 1), 5)
    assert judged(first, second, third) == [None, (1, 2), (1, 2)]  # 0 takes over what 1 has found out
    late = meeting(0, (1, 2), 6)
    assert judged(late, second, third) == [(0, 1, 2)] * 3


def test_a_ring_of_three_is_found() -> None:
    ring = [message(0, 1, 9), message(1, 2, 8), meeting(2, (0,), 3)]
    ring = [replace(item, programs={0: Begun(9 - item.rank, "training")}) for item in ring]
    assert judged(*ring) == [(0, 1, 2)] * 3


def test_the_error_names_both_the_reason_and_the_fix() -> None:
    last = LastCall(Place("train", NOW, 0, 0, 2, 2), "ended")
    own = replace(message(0, 1, 3), place=Place("train", NOW - 4, 0, 0, 2, 5))
    verdict = judge(0, {0: own, 1: idle(1, number=2, last=last)}, {0}, NOW)
    assert verdict is not None
    assert verdict.text == (
        "rank 0 is in train, batch 3 of 5, and waits for 1B0 from rank 1; rank 1 has ended its train after 2 batches. "
        "Nobody can go on: give every rank the same number of batches"
    )
    assert not verdict.is_loss


def test_ranks_that_meet_for_different_things_are_told_both() -> None:
    error = different_calls(["in evaluate", "in evaluate", "in step"])
    assert isinstance(error, ExecutionError)
    assert str(error).startswith("rank 0 is in evaluate; rank 2 is in step. Nobody can go on: every rank must")


def test_a_long_chain_is_told_in_a_text_that_can_be_read() -> None:
    seen = {rank: message(rank, rank + 1, 4) for rank in range(64)} | {64: idle(64, number=3)}
    text = describe_wait(seen[60], seen)
    assert text.index("rank 61 is") < text.index("rank 63 is") < text.index("rank 64 has not called train")
    assert describe_wait(seen[0], seen).count("rank") < 12


def sighted() -> Sighting:
    activity = Activity(1, (0, 1))
    calls = activity.calls()
    with calls.during("evaluate"):
        calls.begin("evaluation")
        activity.end("ValueError: two\nlines")
        with activity.waiting("the loss"):
            return Sighting.of(activity, 7, Verdict("no", (0, 1), False), lasts=True)


def test_a_sighting_is_read_as_it_was_written() -> None:
    own = sighted()
    read = Sighting.load(own.dump())
    assert read == replace(own, ended={EVERYTHING: "ValueError: twolines"})
    assert read.wait == own.wait
    assert isinstance(read.place, Place)


@pytest.mark.parametrize("text", ["", "7", "[]", "{}", '{"rank": 1}', '{"rank": 1e999}', "[" * 5000, '"\\ud800"'])
def test_what_is_no_sighting_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Sighting.load(text)


def test_control_characters_of_others_do_not_get_into_the_log() -> None:
    own = replace(sighted(), last=LastCall(Place("train"), "\x1b[31mred\x07"))
    assert "\x1b" not in Sighting.load(own.dump()).describe()


def test_a_suspended_process_is_said_to_be() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        own = replace(sighted(), pid=process.pid)
        assert "suspended" not in own.describe()
        os.kill(process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while not own.is_suspended and time.monotonic() < deadline:
            time.sleep(0.01)
        assert f"its process {process.pid} is suspended (kill -CONT {process.pid} lets it go on)" in own.describe()
        process.kill()
    assert not own.is_suspended


@pytest.mark.parametrize(
    ("place", "text"),
    [
        (Place(), "in its own code, in no call of the pipeline"),
        (Place("train", 0, 0, 4, 2, 5), "in train, batch 3 of 5"),
        (Place("train", 0, 0, 4, 2, None, "between"), "in its own code, between batches 2 and 3 of its train"),
        (Place("step", 0, 0, 4, 0, 1), "in step, iteration 5"),
        (Place("evaluate", 0, 0, phase="reading"), "in evaluate, waiting for its own data: its batches have not given"),
    ],
)
def test_places_have_names(place: Place, text: str) -> None:
    assert name_place(place).startswith(text)
