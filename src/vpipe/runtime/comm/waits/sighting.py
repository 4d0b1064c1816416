"""What one rank sees of another: its activity at some moment, told in JSON, and said in words."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vpipe.runtime.comm.waits.activity import Activity, Begun, LastCall, Meeting, Place, Wait
from vpipe.words.near import plural

__all__ = ["Sighting", "Verdict", "name_place"]

_HOST = socket.gethostname()

_LONGEST_TEXT = 2000


@dataclass(frozen=True)
class Verdict:
    """Why waits of some ranks can never end."""

    text: str
    ranks: tuple[int, ...]
    is_loss: bool
    """Whether a rank is lost to the others; otherwise ranks do not call the same."""


@dataclass(frozen=True)
class Sighting:
    """What `rank` was doing when its lookout looked for the `tick`-th time."""

    rank: int
    tick: int
    place: Place
    last: LastCall | None = None
    wait: Wait | None = None
    meetings: tuple[Meeting, ...] = ()
    """The last ones; the last of them is the number of all."""
    programs: Mapping[int, Begun] = field(default_factory=dict)
    ended: Mapping[int, str] = field(default_factory=dict)
    verdict: Verdict | None = None
    lasts: bool = False
    """Whether it had done so for a while; otherwise it was getting on."""
    pid: int = 0
    host: str = ""

    @classmethod
    def of(cls, activity: Activity, tick: int, verdict: Verdict | None = None, *, lasts: bool = False) -> Sighting:
        """Return what `activity` is at this moment."""
        return cls(
            activity.rank,
            tick,
            activity.place,
            activity.last,
            activity.wait,
            activity.meetings,
            activity.programs,
            activity.ended,
            verdict,
            lasts,
            os.getpid(),
            _HOST,
        )

    @property
    def num_meetings(self) -> int:
        """Count the meetings of all ranks that this one has come to."""
        return self.meetings[-1].number if self.meetings else 0

    def num_programs(self, pipeline: int) -> int:
        """Count the programs of a pipeline that this rank has begun."""
        program = self.programs.get(pipeline)
        return 0 if program is None else program.number

    def is_as(self, other: Sighting | None) -> bool:
        """Tell whether a rank does what it did when it was seen before."""
        return other is not None and self._what() == other._what()

    def is_at(self, other: Sighting) -> bool:
        """Tell whether a rank has begun nothing since."""
        return (self.meetings, self.programs) == (other.meetings, other.programs)

    def _what(self) -> tuple[object, ...]:
        return self.place, self.last, self.wait, self.meetings, self.programs, self.ended, self.verdict

    @property
    def is_suspended(self) -> bool:
        """Tell whether it is a process of this machine that was stopped, as by SIGSTOP or Ctrl-Z."""
        if self.host != _HOST:
            return False
        with suppress(OSError, IndexError):
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        return False

    def dump(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Sighting:
        """Read it from JSON that any process may have written; control characters are left out.

        Raises:
            ValueError: it is something else.
        """
        try:
            data = json.loads(text)
            last, wait, verdict = data["last"], data["wait"], data["verdict"]
            return cls(
                int(data["rank"]),
                int(data["tick"]),
                _place(data["place"]),
                None if last is None else LastCall(_place(last[0]), _clean(last[1])),
                None if wait is None else _wait(*wait),
                tuple(Meeting(int(number), _clean(key)) for number, key in data["meetings"]),
                {int(index): Begun(int(count), _clean(kind)) for index, (count, kind) in data["programs"].items()},
                {int(index): _clean(why) for index, why in data["ended"].items()},
                None if verdict is None else _verdict(**verdict),
                bool(data["lasts"]),
                int(data["pid"]),
                _clean(data["host"]),
            )
        except (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError) as error:
            raise ValueError("this is no sighting of a rank") from error

    def describe(self) -> str:
        """Say in words what the rank is doing, and for how long."""
        seconds = max(0.0, time.time() - (self.place.since if self.wait is None else self.wait.since))
        doing = name_place(self.place) + ("" if self.wait is None else f", waiting for {self.wait.what}")
        if self.is_suspended:
            return f"{doing}; its process {self.pid} is suspended (kill -CONT {self.pid} lets it go on)"
        last = "" if self.place.call or self.last is None else f"; last, it {_name_last(self.last)}"
        return f"{doing} (for {seconds:.0f} s{last})" if self.lasts else f"getting on, last seen {doing}"


def name_place(place: Place) -> str:
    """Say where in the caller's program a rank is."""
    if not place.call:
        return "in its own code, in no call of the pipeline"
    if place.call == "close":
        text = "closing (the end of a `with` block, or close)"
    elif place.call == "Pipeline":
        text = "making its Pipeline"
    elif place.call == "step":
        text = f"in step, iteration {place.began + 1}"
    elif place.done is not None:
        text = f"in {place.call}, batch {place.done + 1}" + (f" of {place.of}" if place.of is not None else "")
    else:
        text = f"in {place.call}"
    if place.phase == "reading":
        return f"{text}, waiting for its own data: its batches have not given the next one yet"
    if place.phase == "between":
        return f"in its own code, between batches {place.done} and {(place.done or 0) + 1} of its train"
    return text


def _name_last(last: LastCall) -> str:
    place, done = last.place, last.place.done
    if last.how == "ended" and place.call in ("close", "Pipeline"):
        return "closed" if place.call == "close" else "made its Pipeline"
    if last.how == "ended":
        return f"ended its {place.call}" + (
            f" after {plural(done, 'batch', 'batches')}" if done is not None and place.call != "step" else ""
        )
    if last.how == "left":
        return f"left its {place.call} after {plural(done or 0, 'batch', 'batches')}"
    return f"ended its {place.call} with {last.how}"


def _clean(text: Any) -> str:
    return "".join(letter for letter in str(text)[:_LONGEST_TEXT] if letter.isprintable())


def _maybe(number: Any) -> int | None:
    return None if number is None else int(number)


def _place(items: Any) -> Place:
    call, since, pipeline, began, done, of, phase = items
    return Place(_clean(call), float(since), int(pipeline), int(began), _maybe(done), _maybe(of), _clean(phase))


def _wait(what: Any, peers: Any, since: Any, meeting: Any) -> Wait:
    return Wait(_clean(what), tuple(int(peer) for peer in peers), float(since), _maybe(meeting))


def _verdict(text: Any, ranks: Any, is_loss: Any) -> Verdict:
    return Verdict(_clean(text), tuple(int(rank) for rank in ranks), bool(is_loss))
