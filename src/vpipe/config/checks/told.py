"""What the author of a run should know of its schedule: what of a file is not in it, and what few microbatches cost."""

from __future__ import annotations

from vpipe.config.checks.run import is_synchronous
from vpipe.config.fields import show
from vpipe.config.planning.to_plan import to_recipe
from vpipe.config.run import RunConfig
from vpipe.plan.waiting import find_waiting
from vpipe.schedule.registry import known_entry

__all__ = ["tell_schedule"]


def tell_schedule(run: RunConfig, *, is_given: bool, is_flat: bool) -> list[str]:
    """Return what to warn of; `is_given` says whether somebody has given the number of microbatches."""
    entry = known_entry(run.pipeline.schedule)
    notes = () if entry is None else entry.notes
    said = [f"schedule {show(run.pipeline.schedule)}: {note}" for note in notes]
    return said + _tell_waiting(run, is_given=is_given, is_flat=is_flat)


def _tell_waiting(run: RunConfig, *, is_given: bool, is_flat: bool) -> list[str]:
    """Return a line about a run whose ranks wait for long, or whose number of microbatches nobody has given.

    Asynchronous schedules do not wait, and what the planner chooses it explains.
    """
    count, synchronous = run.pipeline.num_microbatches, is_synchronous(run)
    if run.num_stages == 1 or count == "auto" or synchronous is False:
        return []
    size, key = run.train.batch_size, "num_microbatches" if is_flat else "pipeline.num_microbatches"
    origin = f"{key} is not given"
    origin += (
        f": a batch of {size} flows as {count} through {run.num_stages} stages" if is_flat else f", so it is {count}"
    )
    if synchronous is None:  # the planner chooses the schedule
        return [] if is_given else [f"{origin}; with auto the planner chooses it, too"]
    waiting = find_waiting(to_recipe(run), size)
    if waiting is None or (is_given and not waiting.is_long):
        return []
    return [f"{f'{key} is {count}' if is_given else origin}: {waiting}"]
