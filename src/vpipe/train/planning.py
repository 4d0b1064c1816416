"""A run that plans itself: its ranks measure the model, rank 0 decides, and all of them train as decided."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vpipe.config import RunConfig
from vpipe.config.planning.planned import decide, own_counts, sizes_needed
from vpipe.config.planning.to_plan import with_plan
from vpipe.data.progress import no_progress
from vpipe.errors import PlanError, VPipeError
from vpipe.measure.gather import gather
from vpipe.measure.profile import obtain_profile
from vpipe.plan.prediction import Prediction
from vpipe.planner.explain.explain import brief_lines, plan_lines
from vpipe.planner.profile.profile import Profile
from vpipe.report.metrics import MetricsWriter
from vpipe.runtime.comm.world import World
from vpipe.workload.setup import build_setup

__all__ = ["PlannedRun", "plan_run"]

_LOGGER = logging.getLogger(__name__)
_FILE = "planning.jsonl"
"""In the run's directory, for whoever shows how the run gets on: what is measured, and the plan in words."""


@dataclass(frozen=True)
class PlannedRun:
    """A run with nothing left open, and what is expected of it; None where nothing was predicted."""

    config: RunConfig
    prediction: Prediction | None = None


def plan_run(config: RunConfig, world: World, run_directory: Path) -> PlannedRun:
    """Measure the model and plan the run, if it leaves anything to the planner; collective.

    Raises:
        PlanError: nothing fits within the memory limit, or no schedule can be built; on every rank.
        ConfigError, DataError, ModelError: the run cannot be set up.
    """
    if not config.needs_plan:
        predicted = config.plan.predicted
        return PlannedRun(config, None if predicted is None else Prediction.from_dict(predicted))
    setup, sizes = build_setup(config), sizes_needed(config, own_counts(config))
    if world.rank > 0:
        obtain_profile(setup, sizes, world, no_progress)
        decided: PlannedRun | str = ""
    else:
        with MetricsWriter(run_directory / _FILE) as notes:
            profile = obtain_profile(setup, sizes, world, partial(_note_progress, notes))
            decided = _decide(config, profile, lambda text: notes.write({"text": text}))
    (answer, *_) = gather(decided, world)
    if isinstance(answer, str):
        raise PlanError(answer)
    return answer


def _note_progress(notes: MetricsWriter, step: str, done: int, total: int) -> None:
    notes.write({"step": step, "done": done, "total": total})


def _decide(config: RunConfig, profile: Profile, show: Callable[[str], None]) -> PlannedRun | str:
    """Return the planned run, or why there can be none, for all ranks to say the same."""
    try:
        decision = decide(config, profile)
    except VPipeError as error:
        return str(error)
    found = decision.found
    lines = plan_lines(decision.request, decision.chosen) if found is None else brief_lines(found)
    for line in lines:
        show(line)
        _LOGGER.info("%s", line)
    return PlannedRun(with_plan(config, decision.plan), decision.prediction)
