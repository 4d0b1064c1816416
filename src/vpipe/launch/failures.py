"""Which rank failed first and why, in words; the others only show what they were waiting for."""

from __future__ import annotations

import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from vpipe.errors import PeerLostError
from vpipe.launch.logs import log_path
from vpipe.runtime.status import STARTING, Status

__all__ = ["RankEnd", "describe_failure", "find_culprit", "read_end"]

_HINTS = {
    signal.SIGKILL: (
        "if nobody sent it, the machine ran out of memory (see `dmesg`): lower train.batch_size, raise "
        "pipeline.recompute_ratio or use more ranks"
    ),
    signal.SIGSEGV: "a crash in native code: the log has the Python stack",
    signal.SIGABRT: "native code gave up: the end of the log says why",
    signal.SIGBUS: "often a full /dev/shm or a data file that was truncated while mapped",
    signal.SIGILL: "this processor lacks an instruction that a library was built for",
    signal.SIGTERM: "somebody asked it to end",
    signal.SIGINT: "somebody interrupted it",
    signal.SIGXCPU: "a limit on processor time (see `ulimit -t`)",
}


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended in failure.

    `exit_code` is negative for a signal; `message` is None when the rank left none; `kind` is its exception's class;
    `is_expected` tells a VPipeError from a bug; `time` is in seconds since the epoch.
    """

    rank: int
    exit_code: int
    message: str | None = None
    kind: str | None = None
    is_expected: bool = False
    time: float = 0.0

    @property
    def signal_number(self) -> int | None:
        """The signal that ended the rank, if one did."""
        return -self.exit_code if self.exit_code < 0 else None


def read_end(rank: int, failure: ProcessFailure) -> RankEnd:
    """Take from torchrun's record of a failed rank, and from the error file that the rank left, what matters here."""
    data = failure.error_file_data
    content = data.get("message")
    if not isinstance(content, dict):  # torchrun's placeholder: the rank wrote no file
        return RankEnd(rank, failure.exitcode, time=float(failure.timestamp))
    ours = data.get("vpipe", {})
    return RankEnd(
        rank,
        failure.exitcode,
        message=str(content.get("message", "")),
        kind=ours.get("kind"),
        is_expected=bool(ours.get("expected", False)),
        time=float(ours.get("time", failure.timestamp)),
    )


def find_culprit(ends: Sequence[RankEnd], ended_by_launcher: Collection[int] = ()) -> RankEnd:
    """Return the end that caused the others.

    A rank that lost its peer is a consequence, and one that got SIGTERM more so: torchrun sends it to all that are
    left. Among equals the earliest counts; `ends` are in the order in which they were noticed.
    """

    def consequence(end: RankEnd) -> tuple[int, float]:
        if end.rank in ended_by_launcher or (end.message is None and end.signal_number == signal.SIGTERM):
            return 2, 0.0
        return (1 if end.kind == PeerLostError.__name__ else 0), end.time

    return min(ends, key=consequence)


def describe_failure(
    culprit: RankEnd, statuses: Mapping[int, Status | None], run_directory: Path, now: float
) -> dict[int, str]:
    """Say how the culprit ended and, after that, what each other rank was doing if it had got so far; a line by rank.

    `now` is the time, in seconds since the epoch, up to which waits are counted.
    """
    lines = {
        culprit.rank: _describe_culprit(culprit, statuses.get(culprit.rank), log_path(run_directory, culprit.rank))
    }
    for rank, status in sorted(statuses.items()):
        if rank != culprit.rank and status is not None and status.text != STARTING:
            lines[rank] = f"rank {rank} was {status.text} (for {max(0.0, now - status.written_at):.1f} s)"
    return lines


def _describe_culprit(end: RankEnd, status: Status | None, log: Path) -> str:
    if end.message is not None:
        if end.is_expected:
            return f"rank {end.rank} stopped: {end.message}"
        return f"rank {end.rank} failed: {end.message} (the traceback is in {log})"
    if end.signal_number is None:
        return f"rank {end.rank} ended with exit code {end.exit_code} and no message; see the end of {log}"
    during = f" while {status.text}" if status is not None else ""
    return f"rank {end.rank} was killed by {_signal_text(end.signal_number)}{during}{_hint(end.signal_number)}"


def _signal_text(number: int) -> str:
    known = number in signal.valid_signals() and number < signal.SIGRTMIN
    return f"signal {number} ({signal.Signals(number).name})" if known else f"signal {number}"


def _hint(number: int) -> str:
    hints = {int(key): text for key, text in _HINTS.items()}
    return f"; {hints[number]}" if number in hints else ""
