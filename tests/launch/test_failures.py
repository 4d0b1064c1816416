import signal

import pytest

from vpipe.launch.failures import RankEnd, describe_failure, find_culprit
from vpipe.runtime.status import Status

KILLED = RankEnd(2, -signal.SIGKILL, time=100.0)
TERMINATED = RankEnd(0, -signal.SIGTERM, time=100.0)
LOST = RankEnd(1, 1, "rank 2 ended while ...", "PeerLostError", True, 99.9)
STOPPED = RankEnd(3, 1, "the loss became NaN", "NonFiniteLossError", True, 99.95)


@pytest.mark.parametrize(
    ("ends", "culprit"),
    [
        ([LOST, KILLED, TERMINATED], KILLED),
        ([TERMINATED, LOST, STOPPED], STOPPED),
        ([LOST, TERMINATED], LOST),
        ([RankEnd(1, -signal.SIGTERM), TERMINATED], RankEnd(1, -signal.SIGTERM)),
        (
            [RankEnd(0, 1, "b", "ConfigError", True, 8.0), RankEnd(1, 1, "a", "ConfigError", True, 7.0)],
            RankEnd(1, 1, "a", "ConfigError", True, 7.0),
        ),
    ],
)
def test_the_first_cause_is_found_among_its_consequences(ends, culprit):
    assert find_culprit(ends) == culprit


def test_a_rank_that_the_launcher_had_to_kill_is_no_culprit():
    assert find_culprit([LOST, KILLED], ended_by_launcher={2}) == LOST


def test_the_lines_name_signal_hint_and_what_everybody_waited_for(tmp_path):
    statuses = {
        0: Status("waiting for 1F3 from rank 1", 10, 97.0),
        1: None,
        2: Status("running", 12, 99.0),
        3: Status("starting", 13, 90.0),
    }
    lines = describe_failure(KILLED, statuses, tmp_path, now=100.0)
    assert list(lines) == [2, 0]
    assert lines[2].startswith("rank 2 was killed by signal 9 (SIGKILL) while running; ")
    assert "out of memory" in lines[2]
    assert lines[0] == "rank 0 was waiting for 1F3 from rank 1 (for 3.0 s)"


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (STOPPED, "rank 3 stopped: the loss became NaN"),
        (RankEnd(1, 1, "ValueError: surprise"), "rank 1 failed: ValueError: surprise (the traceback is in {log})"),
        (RankEnd(1, 3), "rank 1 ended with exit code 3 and no message; see the end of {log}"),
        (RankEnd(1, -signal.SIGRTMIN), f"rank 1 was killed by signal {int(signal.SIGRTMIN)}"),
    ],
)
def test_how_a_rank_ended_in_words(end, text, tmp_path):
    line = describe_failure(end, {}, tmp_path, now=0.0)[end.rank]
    assert line == text.format(log=tmp_path / f"output.log.{end.rank}")
