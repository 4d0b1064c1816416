"""A plan file as text: the plan itself, its stages, and what it is expected to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vpipe.errors import PlanError
from vpipe.plan.plan import Plan
from vpipe.plan.plan_file import plan_from_dict
from vpipe.plan.policy import Policy
from vpipe.plan.prediction import Prediction
from vpipe.plan.values import as_count
from vpipe.words.near import plural
from vpipe.words.table import format_table
from vpipe.words.units import format_bytes

__all__ = ["show_lines"]


def show_lines(content: Mapping[str, Any]) -> list[str]:
    """Return the lines that show a plan file's content.

    Raises:
        PlanError: it is no plan.
        ScheduleError: its schedule cannot be built for its sizes.
    """
    plan = plan_from_dict(content)
    lines = [repr(plan)]
    if not plan.is_closed:
        return [*lines, "", "The file has the original's keys alone: schedule and microbatches are the run's to say."]
    lines += ["", *_sizes(plan, content), "", *_stage_table(plan, content)]
    if (predicted := content.get("predicted")) is not None:
        lines += ["", *_prediction_lines(Prediction.from_dict(predicted, content.get("profile")))]
    return lines


def _sizes(plan: Plan, content: Mapping[str, Any]) -> list[str]:
    num_ranks, num_microbatches = plan.sizes
    size = as_count("microbatch_size", content.get("microbatch_size"))
    samples = "" if size is None else f" of {plural(size, 'sample', 'samples')}"
    kind = "synchronous" if plan.synchronous else "asynchronous"
    return [
        f"{'schedule':<12} {plan.schedule}, {kind}",
        f"{'ranks':<12} {num_ranks}, {plural(plan.cut.num_stages // num_ranks, 'stage', 'stages')} each",
        f"{'batch':<12} {plural(num_microbatches, 'microbatch', 'microbatches')}{samples}",
        f"{'fingerprint':<12} {plan.fingerprint()}",
    ]


def _stage_table(plan: Plan, content: Mapping[str, Any]) -> list[str]:
    """Return a row for every stage; names of blocks are in the file where a run or the planner wrote it."""
    names = _block_names(content.get("stages") or ())
    rows = [["stage", "rank", "blocks", "warmup", "keep", "recompute", "swap", "from", "to"]]
    policies, warmups = plan.block_policies, plan.warmups()
    for stage, (start, stop) in enumerate(plan.cut.ranges):
        own = policies[start:stop]
        blocks = names.get(stage) or [str(start), str(stop - 1)]
        counts = [str(own.count(policy)) for policy in (Policy.KEEP, Policy.RECOMPUTE, Policy.SWAP)]
        rank = plan.sample.position_of(stage)
        rows.append([str(stage), str(rank), str(stop - start), str(warmups[stage]), *counts, blocks[0], blocks[-1]])
    return format_table(rows, left=(7, 8))


def _block_names(stages: object) -> dict[int, Sequence[str]]:
    """Return the names of every stage's blocks.

    Raises:
        PlanError: `stages` is not what a run or the planner writes.
    """
    try:
        return {int(stage["stage"]): [str(name) for name in stage.get("blocks", ())] for stage in stages}  # type: ignore[attr-defined]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PlanError("stages is not a list of {'stage': 0, 'blocks': ['embedding', ...]}; leave it out") from error


def _prediction_lines(prediction: Prediction) -> list[str]:
    lines = [f"predicted    {prediction.step_ms:.4g} ms per step"]
    if prediction.lower_bound_ms is not None:
        lines[0] += f", at least {prediction.lower_bound_ms:.4g} ms for any plan"
    rows = [["rank", "memory"], *_memory_rows(prediction.memory_bytes)]
    return [*lines, *format_table(rows, left=())]


def _memory_rows(memory_bytes: Sequence[Mapping[str, int]]) -> list[list[str]]:
    return [[str(rank), format_bytes(kinds["total"])] for rank, kinds in enumerate(memory_bytes)]
