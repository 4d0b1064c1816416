"""PipeDream: 1F1B that never empties the pipeline; updates happen while microbatches are in flight.

Idea: stage s updates after each backward. A microbatch's backward uses the very weights that its forward used, so
the stage keeps a version for each microbatch in flight (weight stashing). No bubble in the steady state, at the price
of stale gradients: ``w(t+1) = w(t) - lr * g(w(t - (p-1-s)))``. Three variants:

- plain: stage s holds ``p - s`` versions, its gradients are ``p - 1 - s`` updates old.
- `vertical_sync`: a microbatch keeps the version number it had at stage 0 on every stage: p versions, ``p - 1`` old,
  everywhere.
- `microbatches_per_update` k > 1 (`macrobatch`, PipeDream-2BW): gradients of k microbatches per update, computed from
  the version one update back: two versions, 1 old, everywhere: ``w(t+1) = w(t) - lr * g(w(t-1))``. k must be at
  least p, or a microbatch could need a version that is not made yet.

Here the number of microbatches is all that flow until the pipeline drains: an evaluation, a checkpoint, the end.

Source: Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", SOSP 2019, and
"Memory-Efficient Pipeline-Parallel DNN Training", ICML 2021 (2BW).
"""

from __future__ import annotations

from collections.abc import Sequence

from vpipe.errors import ScheduleError
from vpipe.schedule.action import Action, Kind
from vpipe.schedule.families.warmup import one_f_one_b_order, resolve_depths
from vpipe.schedule.placement import Placement
from vpipe.schedule.schedule import Schedule, WeightRule, freeze

__all__ = ["build_pipedream", "build_pipedream_2bw"]


def build_pipedream(
    num_ranks: int,
    num_microbatches: int,
    *,
    depths: Sequence[int] | None = None,
    microbatches_per_update: int = 1,
    vertical_sync: bool = False,
) -> Schedule:
    """Build asynchronous 1F1B; `depths` are the warmup forwards of each stage, deeper hides latency but is staler.

    A last group of fewer than `microbatches_per_update` microbatches is an update of its own.

    Raises:
        ScheduleError: `depths` that cannot be run, `microbatches_per_update` too small for the ranks or the depths,
            or together with `vertical_sync`.
    """
    resolved = resolve_depths(depths, num_ranks, num_microbatches)
    _check_update(num_ranks, max(resolved), microbatches_per_update, vertical_sync)
    orders = [
        list(_with_updates(stage, depth, num_microbatches, microbatches_per_update))
        for stage, depth in enumerate(resolved)
    ]
    rule = WeightRule.VERTICAL if vertical_sync else WeightRule.NEWEST
    if microbatches_per_update > 1:
        rule = WeightRule.DELAYED
    return Schedule("pipedream", num_microbatches, Placement(num_ranks), freeze(orders), False, rule)


def build_pipedream_2bw(
    num_ranks: int,
    num_microbatches: int,
    *,
    depths: Sequence[int] | None = None,
    microbatches_per_update: int | None = None,
) -> Schedule:
    """Build PipeDream with two weight versions: `build_pipedream` with several microbatches per update, under its name.

    `microbatches_per_update` is the least that two versions allow unless given: one per rank, or the deepest warmup.

    Raises:
        ScheduleError: `depths` that cannot be run, or `microbatches_per_update` too small for the ranks or the depths.
    """
    resolved = resolve_depths(depths, num_ranks, num_microbatches)
    group = max(num_ranks, *resolved) if microbatches_per_update is None else microbatches_per_update
    _check_update(num_ranks, max(resolved), group, vertical_sync=False)
    if group < num_ranks:
        raise ScheduleError(_too_small(group, num_ranks, max(resolved)))
    orders = [list(_with_updates(stage, depth, num_microbatches, group)) for stage, depth in enumerate(resolved)]
    return Schedule("pipedream-2bw", num_microbatches, Placement(num_ranks), freeze(orders), False, WeightRule.DELAYED)


def _with_updates(stage: int, depth: int, num_microbatches: int, group: int) -> list[Action]:
    """Return the stage's 1F1B order with an update after the last backward of each group."""
    order = []
    for action in one_f_one_b_order(stage, depth, num_microbatches):
        order.append(action)
        last = (action.microbatch + 1) % group == 0 or action.microbatch == num_microbatches - 1
        if action.kind is Kind.B and last:
            order.append(Action(stage, Kind.STEP, action.microbatch))
    return order


def _check_update(num_ranks: int, deepest: int, group: int, vertical_sync: bool) -> None:
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise ScheduleError(f"microbatches_per_update must be a whole number from 1 on, got {group!r}")
    if group == 1:
        return
    if vertical_sync:
        raise ScheduleError(
            f"vertical_sync cannot be combined with microbatches_per_update={group}: with two versions all stages use "
            "the same one already; leave vertical_sync out, or set microbatches_per_update=1"
        )
    if group < max(num_ranks, deepest):
        raise ScheduleError(f"{_too_small(group, num_ranks, deepest)} (or 1 for plain PipeDream)")


def _too_small(group: int, num_ranks: int, deepest: int) -> str:
    least = max(num_ranks, deepest)
    return (
        f"microbatches_per_update={group} is too small for {num_ranks} ranks and a deepest warmup of {deepest}: "
        f"with two weight versions at least {least} microbatches must go into an update; set "
        f"microbatches_per_update >= {least}"
    )
