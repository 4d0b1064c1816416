"""A CSV file as a schedule to run: what `vpipe schedule --format csv` prints, or someone wrote by hand.

A file holds one order of so many ranks and microbatches, and is not made for others as a family is.
"""

from __future__ import annotations

from pathlib import Path

from vpipe.errors import ScheduleError
from vpipe.schedule.csv_form import ReadSchedule, read_csv
from vpipe.schedule.schedule import Schedule

__all__ = ["build_from_csv", "check_csv_run", "is_csv_file", "read_csv_file"]


def is_csv_file(name: str) -> bool:
    """Tell whether `name`, given where a schedule is named, means a file."""
    return name.lower().endswith(".csv")


def read_csv_file(path: Path) -> ReadSchedule:
    """Read the schedule in a file, with what is to be said of how it was read.

    Raises:
        ScheduleError: the file cannot be read, or holds no legal schedule.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(
            f"schedule '{path}' cannot be read ({error}); give a CSV file, such as "
            "`vpipe schedule 1f1b --ranks 4 --microbatches 8 --format csv` prints"
        ) from None
    try:
        return read_csv(text, path.stem)
    except ScheduleError as error:
        raise ScheduleError(f"schedule '{path}': {error}") from None


def build_from_csv(
    path: Path, num_ranks: int, num_microbatches: int, *, stages_per_rank: int | None = None
) -> Schedule:
    """Return the schedule in a file, which is the one of these sizes.

    Raises:
        ScheduleError: it is of other sizes; the text says of which.
    """
    schedule = read_csv_file(path).schedule
    asked = {"num_ranks": num_ranks, "num_microbatches": num_microbatches, "stages_per_rank": stages_per_rank}
    held = {
        "num_ranks": schedule.num_ranks,
        "num_microbatches": schedule.num_microbatches,
        "stages_per_rank": schedule.placement.stages_per_rank,
    }
    other = [name for name, size in asked.items() if size not in (None, held[name])]
    if other:
        has = ", ".join(f"{name}={held[name]}" for name in other)
        raise ScheduleError(
            f"schedule '{path}' has {has}, got {', '.join(f'{name}={asked[name]}' for name in other)}; a file holds "
            "one order and no rule for others: use its sizes, or write a file of yours"
        )
    return schedule


def check_csv_run(name: str, *, synchronous: bool) -> list[str]:
    """Return why a run cannot follow the schedule `name`, if it is a file; batch after batch, it needs its order."""
    if synchronous or not is_csv_file(name):
        return []
    return [
        f"schedule '{name}' updates without a barrier: its order goes on from batch to batch, and a file holds the "
        "order of so many microbatches only; such a file can be shown and simulated, to train use a family "
        "(pipedream, pipedream-2bw), or write an order with one update per stage"
    ]
