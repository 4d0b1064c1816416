"""Schedules by name. Adding one costs its file, one line here and one golden picture.

A builder is called as ``builder(num_ranks, num_microbatches, **options)``; its keyword parameters are its options. One
that has the parameter `stages_per_rank` can put several stages on a rank (its default is the family's), any other runs
one. The name of a CSV file is a schedule, too, of the sizes that the file has.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vpipe.errors import ScheduleError
from vpipe.schedule.csv_file import build_from_csv, is_csv_file, read_csv_file
from vpipe.schedule.dualpipe_v import build_dualpipe_v
from vpipe.schedule.gpipe import build_gpipe
from vpipe.schedule.interleaved import build_interleaved
from vpipe.schedule.looped_bfs import build_looped_bfs
from vpipe.schedule.naive import build_naive
from vpipe.schedule.one_f_one_b import build_1f1b
from vpipe.schedule.pipedream import build_pipedream, build_pipedream_2bw
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.searched import build_searched
from vpipe.schedule.v_memory import build_v_half, build_v_min
from vpipe.schedule.zb_v import build_zb_v
from vpipe.schedule.zero_bubble import build_zb_h1, build_zb_h2

__all__ = ["SCHEDULES", "Entry", "build_schedule", "find_entry", "known_entry"]


@dataclass(frozen=True)
class Entry:
    """A schedule family: how to build it, whether its result is that of one process, and what it does in a sentence."""

    builder: Callable[..., Schedule]
    synchronous: bool
    summary: str

    @property
    def parameters(self) -> tuple[str, ...]:
        """Name the builder's keyword parameters, `stages_per_rank` included where it has it."""
        parameters = inspect.signature(self.builder).parameters.values()
        return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)

    @property
    def options(self) -> tuple[str, ...]:
        """Name the builder's options."""
        return tuple(name for name in self.parameters if name != "stages_per_rank")

    @property
    def default_stages_per_rank(self) -> int:
        """Return how many stages a rank holds where nobody says; 1 where the builder would choose."""
        parameter = inspect.signature(self.builder).parameters.get("stages_per_rank")
        return 1 if parameter is None or parameter.default is None else int(parameter.default)


SCHEDULES: dict[str, Entry] = {
    "naive": Entry(build_naive, True, "One microbatch at a time through all stages: one rank works, the rest wait."),
    "gpipe": Entry(build_gpipe, True, "All forwards, then all backwards, then one update: each rank holds them all."),
    "1f1b": Entry(build_1f1b, True, "After a warmup, a forward and a backward in turn: GPipe's time, less memory."),
    "interleaved": Entry(build_interleaved, True, "1F1B with several stages per rank: a smaller bubble, more traffic."),
    "looped-bfs": Entry(build_looped_bfs, True, "GPipe with several stages per rank: whole batches stage by stage."),
    "zb-h1": Entry(build_zb_h1, True, "Weight gradients fill idle time: a third of 1F1B's bubble in 1F1B's memory."),
    "zb-h2": Entry(build_zb_h2, True, "ZB-H1 further ahead: no idle time inside a rank's own, for twice the memory."),
    "zb-v": Entry(build_zb_v, True, "Zero bubble in 1F1B's memory: stages go down the ranks and up again."),
    "v-half": Entry(build_v_half, True, "The V with half of 1F1B's memory, and half of its bubble."),
    "v-min": Entry(build_v_min, True, "The V with a third of 1F1B's memory, and two thirds of its bubble."),
    "dualpipe-v": Entry(
        build_dualpipe_v, True, "The V in which each forward has a backward beside it to overlap with."
    ),
    "searched": Entry(build_searched, True, "The best order that a search finds for given costs and memory."),
    "pipedream": Entry(build_pipedream, False, "1F1B without a flush: updates while it runs, old weights stashed."),
    "pipedream-2bw": Entry(build_pipedream_2bw, False, "PipeDream with several microbatches per update: two versions."),
}


def build_schedule(
    name: str, num_ranks: int, num_microbatches: int, *, stages_per_rank: int | None = None, **options: object
) -> Schedule:
    """Build the schedule `name` for so many ranks and microbatches.

    Args:
        name: a key of `SCHEDULES`, or a CSV file.
        num_ranks: ranks in the pipeline.
        num_microbatches: microbatches of one batch; in an asynchronous schedule, all until the pipeline drains.
        stages_per_rank: stages that each rank holds; None: what the family holds by default, mostly 1.
        options: keyword parameters of the family's builder, e.g. `depths`.

    Raises:
        ScheduleError: unknown name or option, or a size that the family cannot run; the text says what is legal.
    """
    entry = find_entry(name)
    sizes = {"num_ranks": num_ranks, "num_microbatches": num_microbatches}
    if stages_per_rank is not None:
        sizes["stages_per_rank"] = stages_per_rank
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ScheduleError(f"{key} must be a whole number from 1 on, got {value!r}")
    for option in options:
        if option not in entry.options:
            known = ", ".join(entry.options) or "none"
            hint = _did_you_mean(option, entry.options)
            raise ScheduleError(f"schedule '{name}' has no option '{option}'{hint}; its options: {known}")
    if stages_per_rank is None:
        return entry.builder(num_ranks, num_microbatches, **options)
    if "stages_per_rank" in entry.parameters:
        return entry.builder(num_ranks, num_microbatches, stages_per_rank=stages_per_rank, **options)
    if stages_per_rank != 1:
        several = ", ".join(key for key, other in SCHEDULES.items() if "stages_per_rank" in other.parameters)
        raise ScheduleError(
            f"schedule '{name}' runs one stage per rank, got stages_per_rank={stages_per_rank}; set it to 1, or use a "
            f"schedule that can hold several: {several}"
        )
    return entry.builder(num_ranks, num_microbatches, **options)


def find_entry(name: str) -> Entry:
    """Return the family called `name`, or what there is to know about the CSV file of that name.

    Raises:
        ScheduleError: there is none; the text lists those there are. Or the file holds no legal schedule.
    """
    if is_csv_file(name):
        return _entry_of_file(Path(name))
    if name not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise ScheduleError(f"unknown schedule '{name}'{_did_you_mean(name, SCHEDULES)}; known schedules: {known}")
    return SCHEDULES[name]


def known_entry(name: str) -> Entry | None:
    """Return what `find_entry` finds, or None where it finds nothing."""
    try:
        return find_entry(name)
    except ScheduleError:
        return None


def _entry_of_file(path: Path) -> Entry:
    schedule = read_csv_file(path)
    builder = partial(build_from_csv, path, stages_per_rank=schedule.placement.stages_per_rank)
    return Entry(builder, schedule.synchronous, f"The order in {path.name}.")


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""
