"""What of a run the figures of a profile depend on: its model and sizes, and the machine."""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from vpipe._version import __version__
from vpipe.config.fields import show
from vpipe.config.run import RunConfig
from vpipe.config.sections import ModelConfig
from vpipe.errors import PlanError
from vpipe.planner.profile.profile import Profile

__all__ = ["check_profile_fits", "describe_host", "model_keys", "other_keys", "profile_warnings"]

_NO_COST = ("size", "init_from", "entry")
"""Of a model: `size` and `init_from` fill in numbers, and the place of a file is another on each machine."""
_OPEN = "null"
_MOST = 3
"""Keys that are named; those of another type of model differ in nearly all."""


def model_keys(run: RunConfig) -> dict[str, str]:
    """Return the keys of model, data and optimizer that decide what a block costs, with their values as text."""
    names = [name for name in ModelConfig.model_fields if name not in _NO_COST]
    keys = {f"model.{name}": show(getattr(run.model, name)) for name in names}
    keys |= {f"data.{name}": show(getattr(run.data, name)) for name in ("type", "sequence_length", "options")}
    for section, entry in (("model", run.model.entry), ("data", run.data.entry)):
        if entry is not None:
            keys |= _entry_keys(section, entry)
    keys["optimizer.name"] = show(run.optimizer.name)
    if run.optimizer.name == "sgd":
        keys["optimizer.momentum"] = "0" if run.optimizer.momentum == 0 else "above 0"
    return keys


def _entry_keys(section: str, entry: str) -> dict[str, str]:
    place, _, function = entry.rpartition(":")
    keys = {f"{section}.entry": f"{Path(place).name}:{function}"}
    if place.endswith(".py") and Path(place).is_file():
        keys[f"the code of {section}.entry"] = hashlib.blake2b(Path(place).read_bytes(), digest_size=6).hexdigest()
    return keys


def other_keys(run: RunConfig, measured: Mapping[str, str]) -> list[str]:
    """Return "key = measured value, and the run has its own" for each key that differs; empty where none does.

    What the run leaves to its data is not compared, and nothing is with figures that no run was measured for.
    """
    own = model_keys(run)
    found = [key for key in own if key in measured and own[key] not in (measured[key], _OPEN)]
    more = [f"{len(found) - _MOST} more that differ"] if len(found) > _MOST else []
    return [f"{key} = {measured[key]}, and the run has {own[key]}" for key in found[:_MOST]] + more


def check_profile_fits(run: RunConfig, profile: Profile, source: str) -> None:
    """Raise PlanError for a profile of another model, or of other sizes of it; `source` names it."""
    again = "measure again with `vpipe profile`, or change the run"
    if run.num_blocks is not None and run.num_blocks != profile.num_blocks:
        raise PlanError(
            f"{source}: is of a model of {profile.num_blocks} blocks, and the run's has {run.num_blocks}; {again}"
        )
    if other := other_keys(run, profile.made_of):
        raise PlanError(f"{source}: was measured with {'; with '.join(other)}; {again}")


def describe_host(run: RunConfig, num_threads: int) -> dict[str, str]:
    """Say what is measured on, and how many ranks are busy at once."""
    launch = run.launch
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "ranks": str(run.num_ranks),
        "threads_per_rank": str(num_threads),
        "link": f"{launch.distributed_backend or 'default'}{' in shared memory' * launch.shared_memory}, "
        f"{launch.link_latency_ms} ms and {launch.link_bandwidth_mb_per_s or 'no limit of'} MB/s added",
        "swap_directory": str(run.plan.swap_directory or tempfile.gettempdir()),
        "torch": metadata.version("torch"),
        "vpipe": __version__,
    }


def profile_warnings(run: RunConfig, profile: Profile, num_threads: int, source: str) -> list[str]:
    """Say where a profile was measured on another machine, or otherwise than the run computes: it may be meant so."""
    here = describe_host(run, num_threads)
    other = [
        f"{key} {profile.machine[key]} (here {value})"
        for key, value in here.items()
        if key in profile.machine and profile.machine[key] != value
    ]
    return [f"{source} was measured with {', '.join(other)}: times hold for that"] if other else []


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
