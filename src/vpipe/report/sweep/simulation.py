"""A run of a sweep on paper: what the simulator says of it, from what its blocks were measured to cost."""

from __future__ import annotations

from vpipe.config import RunConfig
from vpipe.config.planning.planned import decide
from vpipe.planner.profile.profile import Profile
from vpipe.report.sweep.sweep import Result

__all__ = ["simulate_run"]


def simulate_run(config: RunConfig, profile: Profile) -> Result:
    """Return the predicted throughput, bubble and memory of the largest rank; nothing about the loss.

    What the run leaves to the planner is planned first.

    Raises:
        PlanError: the profile is of another model or other sizes, or nothing fits within the run's memory limit.
        ScheduleError: the schedule cannot be built.
    """
    plan = decide(config, profile).chosen
    busy_ms = sum(plan.stage_ms) * plan.setting.num_microbatches
    return Result(
        {
            "samples_per_second": 1e3 / plan.sample_ms,
            "iteration_ms": plan.step_ms,
            "bubble_fraction": max(0.0, 1 - busy_ms / (config.num_ranks * plan.step_ms)),
            "predicted_memory_bytes": max(memory.total for memory in plan.memory),
        }
    )
