"""Schedules as CSV: a row per rank, a cell per action, in the text form that is printed everywhere (``2F0``).

The first row may say what the orders cannot: ``# schedule,name=zb-v,placement=v,update=synchronous,weights=newest``.
Without it a file is read as what it looks like, so that the CSV of `torch.distributed.pipelining` can be read too, both
of its forms: empty cells (its waits) are skipped, pairs ``(0F1;7B0)OVERLAP_F_B`` are taken apart, and stages without an
update get one at the end. Its sends and receives are checked, and left out as `lower` makes them; what it does for
shards and replicas is left out, too; and backwards that are not in microbatch order are put into it.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.csv_torch import (
    IN_ORDER,
    check_communication,
    in_microbatch_order,
    is_for_shards,
    without_communication,
)
from vpipe.schedule.placement import Placement
from vpipe.schedule.proof.validate import check_schedule, validate_schedule
from vpipe.schedule.schedule import Schedule, WeightRule, freeze
from vpipe.words.near import plural

__all__ = ["ReadSchedule", "from_csv", "read_csv", "to_csv"]

_Style = Literal["loop", "v"]
_MARK = "# schedule"
_PAIR = re.compile(r"\((.*)\)OVERLAP_F_B")
_UPDATES = {"synchronous": True, "asynchronous": False}


def to_csv(schedule: Schedule) -> str:
    """Return `schedule` as CSV; `from_csv` reads it back as it was."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    update = "synchronous" if schedule.synchronous else "asynchronous"
    head = {
        "name": schedule.name,
        "placement": schedule.placement.style,
        "update": update,
        "weights": schedule.weight_rule.value,
    }
    writer.writerow([_MARK, *(f"{key}={value}" for key, value in head.items())])
    writer.writerows([str(action) for action in order] for order in schedule.orders)
    return text.getvalue()


class ReadSchedule(NamedTuple):
    """A schedule from a file, and what of the file is not in it."""

    schedule: Schedule
    notes: tuple[str, ...]


def from_csv(text: str, name: str = "csv") -> Schedule:
    """Do what `read_csv` does, and return the schedule alone."""
    return read_csv(text, name).schedule


def read_csv(text: str, name: str = "csv") -> ReadSchedule:
    """Read a schedule from CSV and check that it is legal; `name` is used where the file has none.

    Raises:
        ScheduleError: a cell is no action, stages are laid over the ranks neither in a loop nor in a V, the first row
            says something unknown, sends and receives are not those of the computations, or the schedule is not legal.
    """
    rows = list(csv.reader(text.splitlines()))
    while rows and not rows[-1]:
        rows.pop()
    has_head = bool(rows and rows[0] and rows[0][0].strip() == _MARK)
    head = _read_head(rows.pop(0)) if has_head else {}
    given, notes = _read_rows(rows)
    orders = without_communication(given)
    if not any(orders):
        raise ScheduleError("the CSV has no actions; write one row per rank, e.g. 0F0,0F1,0B0,0B1,0STEP1")
    placement = _find_placement(orders, head.get("placement"))
    num_microbatches = 1 + max(action.microbatch for order in orders for action in order)
    check_communication(given, placement, num_microbatches)
    if not any(action.kind is Kind.STEP for order in orders for action in order):
        for rank, order in enumerate(orders):
            stages = reversed(placement.stages_of(rank))
            order += [Action(stage, Kind.STEP, num_microbatches - 1) for stage in stages]
    update = head.get("update")
    schedule = Schedule(
        head.get("name", name),
        num_microbatches,
        placement,
        freeze(orders),
        _updates_once(orders) if update is None else _UPDATES[update],
        WeightRule(head.get("weights", WeightRule.NEWEST.value)),
    )
    if check_schedule(schedule):
        renamed = replace(schedule, orders=freeze(in_microbatch_order(orders)))
        if not has_head and not check_schedule(renamed):
            return ReadSchedule(renamed, (*notes, IN_ORDER))
        validate_schedule(schedule)
    return ReadSchedule(schedule, tuple(notes))


def _read_head(row: Sequence[str]) -> dict[str, str]:
    known: dict[str, tuple[str, ...]] = {
        "name": (),
        "placement": get_args(_Style),
        "update": tuple(_UPDATES),
        "weights": tuple(rule.value for rule in WeightRule),
    }
    head = {}
    for cell in row[1:]:
        key, equals, value = cell.strip().partition("=")
        if key not in known or not equals:
            raise ScheduleError(
                f"the CSV's first row has '{cell}'; it may say {', '.join(f'{key}=...' for key in known)}"
            )
        if known[key] and value not in known[key]:
            raise ScheduleError(f"the CSV's first row has {key}={value}; write one of {', '.join(known[key])}")
        head[key] = value
    return head


def _read_rows(rows: Sequence[Sequence[str]]) -> tuple[list[list[Action]], list[str]]:
    """Return what is in the rows, and what to say about cells that are left out."""
    skipped: list[str] = []
    orders = [_read_row(rank, row, skipped) for rank, row in enumerate(rows)]
    if not skipped:
        return orders, []
    kinds = [kind for kind in ("UNSHARD", "RESHARD", "REDUCE_GRAD") if any(kind in cell for cell in skipped)]
    note = (
        f"{plural(len(skipped), 'cell', 'cells')} of {' and '.join(kinds)} left out: they are for sharded weights and "
        "replicas, of which a stage here has none"
    )
    return orders, [note]


def _read_row(rank: int, row: Sequence[str], skipped: list[str]) -> list[Action]:
    actions = []
    for column, cell in enumerate(row):
        pair = _PAIR.fullmatch(cell.strip())
        for word in pair[1].split(";") if pair else [cell]:
            if not word.strip():
                continue
            if is_for_shards(word.strip()):
                skipped.append(word)
                continue
            try:
                actions.append(Action.parse(word))
            except ScheduleError as error:
                raise ScheduleError(f"rank {rank}, cell {column}: {error}") from None
    return actions


def _find_placement(orders: Sequence[Sequence[Action]], style: str | None) -> Placement:
    num_ranks = len(orders)
    held = [sorted({action.stage for action in order}) for order in orders]
    num_stages = 1 + max(stage for stages in held for stage in stages)
    styles: tuple[_Style, ...] = get_args(_Style)
    for candidate in styles:
        if style not in (None, candidate) or num_stages % num_ranks:
            continue
        placement = Placement(num_ranks, num_stages // num_ranks, candidate)
        if all(tuple(stages) == placement.stages_of(rank) for rank, stages in enumerate(held)):
            return placement
    laid = "; ".join(f"rank {rank}: {', '.join(map(str, stages)) or 'none'}" for rank, stages in enumerate(held[:8]))
    wanted = "a loop (0 to p - 1, then from rank 0 again) or a V (then back from rank p - 1)"
    raise ScheduleError(
        f"the CSV lays {num_stages} stages over {num_ranks} ranks, but not as many on each in "
        f"{wanted if style is None else 'placement=' + style}: {laid}; other layouts cannot be run"
    )


def _updates_once(orders: Sequence[Sequence[Action]]) -> bool:
    updates = Counter(action.stage for order in orders for action in order if action.kind is Kind.STEP)
    return max(updates.values()) == 1
