"""What a run says that an estimate of it goes by; cuts and what blocks do with their activations are planned anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vpipe.config.planning.planned import name_schedules, own_counts
from vpipe.config.planning.to_plan import to_recipe
from vpipe.config.run import RunConfig
from vpipe.plan.policy import Policy
from vpipe.plan.recipe import BESIDES, OPTIONS, Recipe
from vpipe.words.units import format_bytes

__all__ = ["RunWishes", "run_wishes"]

_FP32 = 4
_NUM_MOMENTS = {"adam": 2, "adamw": 2, "lamb": 2, "sgd": 1}


@dataclass(frozen=True)
class RunWishes:
    """How a run is trained, as far as an estimate asks; None leaves it open."""

    num_ranks: int
    batch_size: int
    schedules: tuple[str, ...]
    num_microbatches: int | None
    stages_per_rank: int | None
    limits: tuple[int, ...] | None
    """Bytes, one for all ranks or one each."""
    may_recompute: bool
    state_bytes: int
    """Of the optimizer, for each parameter, a master copy of the weights not included."""
    options: Recipe = field(default_factory=Recipe)
    """Of the schedules, and what their stages do besides, as `Request` has them."""
    said: Mapping[str, str] = field(default_factory=dict)
    """The same in words, by the run's keys."""

    @property
    def policies(self) -> tuple[Policy, ...]:
        """What blocks may do."""
        return tuple(policy for policy in Policy if self.may_recompute or policy is not Policy.RECOMPUTE)


def run_wishes(run: RunConfig) -> RunWishes:
    """Return what a run says.

    Raises:
        ScheduleError: there is no such schedule.
    """
    pipeline, limit = run.pipeline, run.plan.memory_limit
    counts = own_counts(run)
    limits = None if limit is None else (limit,) if isinstance(limit, int) else tuple(limit)
    is_open = pipeline.stages_per_rank == 1 and pipeline.schedule == "auto"
    return RunWishes(
        num_ranks=run.num_ranks,
        batch_size=run.train.batch_size,
        schedules=name_schedules(pipeline.schedule),
        num_microbatches=counts[0] if counts else None,
        stages_per_rank=None if is_open else pipeline.stages_per_rank,
        limits=limits,
        may_recompute=pipeline.recompute != "never",
        state_bytes=_state_bytes(run),
        options=to_recipe(run).with_ahead(()),
        said=_said(run, limits),
    )


def _state_bytes(run: RunConfig) -> int:
    optimizer = run.optimizer
    without = optimizer.name == "sgd" and not optimizer.momentum
    return 0 if without else _FP32 * _NUM_MOMENTS[optimizer.name]


def _said(run: RunConfig, limits: tuple[int, ...] | None) -> dict[str, str]:
    pipeline = run.pipeline
    said = {
        "pipeline.num_ranks": str(run.num_ranks),
        "pipeline.schedule": pipeline.schedule,
        "pipeline.num_microbatches": str(pipeline.num_microbatches),
        "train.batch_size": str(run.train.batch_size),
        "optimizer.name": run.optimizer.name,
    }
    if pipeline.stages_per_rank > 1:
        said["pipeline.stages_per_rank"] = str(pipeline.stages_per_rank)
    if pipeline.recompute == "never":
        said["pipeline.recompute"] = "never"
    if limits is not None:
        said["plan.memory_limit"] = ", ".join(map(format_bytes, limits))
    options = {f"pipeline.{option.key}": getattr(pipeline, option.key) for option in OPTIONS}
    moves = {f"plan.{name}": getattr(run.plan, name) for name, what in BESIDES.items() if what == "weights"}
    given = {key: value for key, value in options.items() if value} | {k: v for k, v in moves.items() if v is not None}
    return said | {key: str(value) for key, value in given.items()}
