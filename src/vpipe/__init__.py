"""VPipe: pipeline-parallel training of PyTorch models.

What a program needs is here: `Pipeline` trains a model that is spread over ranks, by a `Plan`; `Chain` and `Block`
describe one that is no plain row of modules; `build_schedule` and `simulate` show what a pipeline does without running
it; `load_config` reads the YAML of a run, and `find_plan` plans it from its `Profile`. Every name is imported when it
is first used, so schedules, configurations and plans work without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from vpipe._version import __version__

if TYPE_CHECKING:
    from vpipe.config.load import load_config
    from vpipe.config.planning.planned import build_request, decide
    from vpipe.config.run import RunConfig
    from vpipe.data.source import ArraySource, BatchSource, FieldSpec
    from vpipe.errors import (
        ConfigError,
        DataError,
        ExecutionError,
        LaunchError,
        MemoryLimitError,
        ModelError,
        NonFiniteLossError,
        PeerLostError,
        PlanError,
        ScheduleError,
        TransportError,
        VPipeError,
    )
    from vpipe.measure.profile import profile_config
    from vpipe.model.block import Block, ParameterRef
    from vpipe.model.chain import Chain
    from vpipe.model.loss import CallableLoss, Loss, Metric
    from vpipe.plan.plan import Plan
    from vpipe.plan.prediction import Prediction
    from vpipe.plan.recipe import RankTimes, Recipe
    from vpipe.planner.explain.explain import explain_lines
    from vpipe.planner.profile.profile import Profile, read_profile
    from vpipe.planner.search.search import find_plan
    from vpipe.report.sweep.simulation import simulate_run
    from vpipe.runtime.arguments import Memory
    from vpipe.runtime.batch import Batch
    from vpipe.runtime.comm.world import World
    from vpipe.runtime.hooks import Hooks
    from vpipe.runtime.pipeline import Pipeline, StepResult
    from vpipe.runtime.weights.update import Update
    from vpipe.schedule.action import Action, Kind
    from vpipe.schedule.placement import Placement
    from vpipe.schedule.proof.validate import validate_schedule
    from vpipe.schedule.registry import build_schedule
    from vpipe.schedule.schedule import Schedule, WeightRule
    from vpipe.schedule.simulate.costs import Costs
    from vpipe.schedule.simulate.simulate import Simulation, simulate

__all__ = [
    "Action",
    "ArraySource",
    "Batch",
    "BatchSource",
    "Block",
    "CallableLoss",
    "Chain",
    "ConfigError",
    "Costs",
    "DataError",
    "ExecutionError",
    "FieldSpec",
    "Hooks",
    "Kind",
    "LaunchError",
    "Loss",
    "Memory",
    "MemoryLimitError",
    "Metric",
    "ModelError",
    "NonFiniteLossError",
    "ParameterRef",
    "PeerLostError",
    "Pipeline",
    "Placement",
    "Plan",
    "PlanError",
    "Prediction",
    "Profile",
    "RankTimes",
    "Recipe",
    "RunConfig",
    "Schedule",
    "ScheduleError",
    "Simulation",
    "StepResult",
    "TransportError",
    "Update",
    "VPipeError",
    "WeightRule",
    "World",
    "__version__",
    "build_request",
    "build_schedule",
    "decide",
    "explain_lines",
    "find_plan",
    "load_config",
    "profile_config",
    "read_profile",
    "simulate",
    "simulate_run",
    "validate_schedule",
]

_HOMES = {
    "vpipe.config.load": ("load_config",),
    "vpipe.config.planning.planned": ("build_request", "decide"),
    "vpipe.config.run": ("RunConfig",),
    "vpipe.data.source": ("ArraySource", "BatchSource", "FieldSpec"),
    "vpipe.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "vpipe.model.block": ("Block", "ParameterRef"),
    "vpipe.model.chain": ("Chain",),
    "vpipe.model.loss": ("CallableLoss", "Loss", "Metric"),
    "vpipe.planner.explain.explain": ("explain_lines",),
    "vpipe.planner.profile.profile": ("Profile", "read_profile"),
    "vpipe.planner.search.search": ("find_plan",),
    "vpipe.plan.plan": ("Plan",),
    "vpipe.plan.prediction": ("Prediction",),
    "vpipe.plan.recipe": ("RankTimes", "Recipe"),
    "vpipe.report.sweep.simulation": ("simulate_run",),
    "vpipe.runtime.arguments": ("Memory",),
    "vpipe.runtime.batch": ("Batch",),
    "vpipe.runtime.comm.world": ("World",),
    "vpipe.runtime.hooks": ("Hooks",),
    "vpipe.runtime.pipeline": ("Pipeline", "StepResult"),
    "vpipe.runtime.weights.update": ("Update",),
    "vpipe.schedule.action": ("Action", "Kind"),
    "vpipe.schedule.simulate.costs": ("Costs",),
    "vpipe.schedule.placement": ("Placement",),
    "vpipe.schedule.registry": ("build_schedule",),
    "vpipe.schedule.schedule": ("Schedule", "WeightRule"),
    "vpipe.schedule.simulate.simulate": ("Simulation", "simulate"),
    "vpipe.schedule.proof.validate": ("validate_schedule",),
    "vpipe.measure.profile": ("profile_config",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'vpipe' has no attribute '{name}'")
    value: object = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
