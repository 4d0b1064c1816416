"""Schedules by name: the families made by hand, the searched one, and files.

A new family gets its line in the catalogue. The name of a CSV file is a schedule, too, of the sizes that the file has.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from vpipe.errors import ScheduleError
from vpipe.schedule.csv_file import build_from_csv, is_csv_file, read_csv_file
from vpipe.schedule.entry import Entry
from vpipe.schedule.families.catalogue import ASYNCHRONOUS, SYNCHRONOUS
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.search.searched import build_searched
from vpipe.words.near import did_you_mean

__all__ = ["SCHEDULES", "build_schedule", "find_entry", "known_entry"]


SCHEDULES: dict[str, Entry] = {
    **SYNCHRONOUS,
    "searched": Entry(build_searched, True, "The best order that a search finds for given costs and memory."),
    **ASYNCHRONOUS,
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
        options: keyword parameters of the family's builder, e.g. `search_steps`.

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
            hint = did_you_mean(option, entry.options)
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
        raise ScheduleError(f"unknown schedule '{name}'{did_you_mean(name, SCHEDULES)}; known schedules: {known}")
    return SCHEDULES[name]


def known_entry(name: str) -> Entry | None:
    """Return what `find_entry` finds, or None where it finds nothing."""
    try:
        return find_entry(name)
    except ScheduleError:
        return None


def _entry_of_file(path: Path) -> Entry:
    schedule, notes = read_csv_file(path)
    builder = partial(build_from_csv, path, stages_per_rank=schedule.placement.stages_per_rank)
    return Entry(builder, schedule.synchronous, f"The order in {path.name}.", notes)
