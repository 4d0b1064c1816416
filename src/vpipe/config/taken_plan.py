"""What a run takes from the plan file that `plan.partition` names, and what it says itself instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vpipe.config.fields import show
from vpipe.config.original.files import PartitionFile
from vpipe.config.tree import Tree, get_key, set_key
from vpipe.plan.recipe import BESIDES, OPTIONS

__all__ = ["take_plan"]

_OF_SCHEDULE = ("stages_per_rank", *(option.key for option in OPTIONS))
_MAY_BE_AUTO = ("pipeline.schedule", "pipeline.num_microbatches")
_SAYS_ALL = ("plan.policies", "pipeline.recompute_ratio")


def take_plan(tree: Tree, content: PartitionFile) -> list[str]:
    """Let a run do what a plan file says, but for the keys that the run gives itself; return what to warn of.

    A key that is `auto` is not given. A file that says no more than the original's does leaves all other keys alone.
    """
    name = get_key(tree, "plan.partition")
    set_key(tree, "plan.partition", "uniform" if content.partition is None else content.partition)
    other = _take_keys(tree, content.run)
    is_own_schedule = "pipeline.schedule" in other
    replaced = _take_policies(tree, content, is_own_schedule=is_own_schedule)
    if not is_own_schedule:
        other |= _take_besides(tree, content, replaced)
    if content.predicted is not None and not other and not replaced:
        set_key(tree, "plan.predicted", content.predicted)
    warnings = [
        f"plan.partition = {name} was planned for {key} = {show(planned)}, and the run has {show(own)}, which counts: "
        f"the prediction does not hold; leave {key} out{', or say auto,' * (key in _MAY_BE_AUTO)} to run the plan"
        for key, (planned, own) in other.items()
    ]
    if replaced and content.run:
        warnings.append(
            f"plan.partition = {name} says what blocks do with activations, and {replaced} = "
            f"{show(get_key(tree, replaced))} of the run counts instead: the prediction does not hold"
        )
    return warnings


def _take_keys(tree: Tree, planned: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Set the keys that the run leaves open; return those that it gives another value, with both."""
    other: dict[str, tuple[Any, Any]] = {}
    for key, value in planned.items():
        own = get_key(tree, key)
        if own not in (None, "auto") and own != value:
            other[key] = value, own
    if get_key(tree, "launch.machines"):
        planned = {key: value for key, value in planned.items() if key != "pipeline.num_ranks"}
    is_own_schedule = "pipeline.schedule" in other
    for key, value in planned.items():
        if get_key(tree, key) in (None, "auto") and not (is_own_schedule and key.endswith(_OF_SCHEDULE)):
            set_key(tree, key, value)
    return other


def _take_besides(tree: Tree, content: PartitionFile, replaced: str | None) -> dict[str, tuple[Any, Any]]:
    """Let stages do besides what the file says; return what the run itself says otherwise, with both."""
    other: dict[str, tuple[Any, Any]] = {}
    for name, what in BESIDES.items():
        key, planned = f"plan.{name}", content.besides.get(name)
        own = get_key(tree, key)
        if own is not None and content.run and (own or planned) and own != planned:
            other[key] = planned, own
        elif own is None and planned is not None and not (replaced and what == "activations"):
            set_key(tree, key, planned)
    return other


def _take_policies(tree: Tree, content: PartitionFile, *, is_own_schedule: bool) -> str | None:
    """Do with activations what the file says, unless the run itself says something about that; return its key then."""
    mode = get_key(tree, "pipeline.recompute")
    if own := next((key for key in _SAYS_ALL if get_key(tree, key) is not None), None):
        return own
    if mode is False and content.recompute_ratio is not None:
        set_key(tree, "pipeline.recompute_ratio", content.recompute_ratio)  # and false overrules it
    if mode not in (None, True):
        keeps_all = isinstance(content.policies, list) and set(content.policies) == {"keep"}
        return None if keeps_all and mode in (False, "never") else "pipeline.recompute"
    if content.recompute == "except_last" and not is_own_schedule:
        if get_key(tree, "plan.memory_limit") is not None:
            return "plan.memory_limit"
        set_key(tree, "pipeline.recompute", content.recompute)
    elif content.policies is not None:
        set_key(tree, "plan.policies", content.policies)
        set_key(tree, "pipeline.recompute", None)
    elif content.recompute_ratio is not None:
        set_key(tree, "pipeline.recompute_ratio", content.recompute_ratio)
    return None
