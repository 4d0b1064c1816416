"""Keys of a run that have another name now: the old one still works, with a warning."""

from __future__ import annotations

from vpipe.config.problems import Problem
from vpipe.config.tree import Tree, get_key, remove_key, set_key

__all__ = ["present_name", "take_old_names", "with_first_names"]

_NEW = {"pipeline.memory_limit_microbatches": "pipeline.max_in_flight"}


def present_name(key: str) -> tuple[str, list[str]]:
    """Return what a key is called now, and what to warn of if that is another name."""
    new = _NEW.get(key, key)
    return new, [] if new == key else [_warning(key, new)]


def with_first_names(text: str) -> str:
    """Return a run's YAML as the first version of VPipe that had its keys would write it: a name for it that lasts."""
    for old, new in _NEW.items():
        text = text.replace(f"  {new.rpartition('.')[2]}:", f"  {old.rpartition('.')[2]}:")
    return text


def take_old_names(tree: Tree) -> tuple[list[Problem], list[str]]:
    """Move what stands under an old key to the new one; return what is wrong, and what to warn of."""
    problems, warnings = [], []
    for old, new in _NEW.items():
        value = get_key(tree, old)
        remove_key(tree, old)  # also where it says nothing, as in what an older version wrote
        if value is None:
            continue
        if get_key(tree, new) is not None:
            problems.append(Problem((new,), f"{old} and {new} are the same setting, given twice; keep {new}"))
            continue
        set_key(tree, new, value)
        warnings.append(_warning(old, new))
    return problems, warnings


def _warning(old: str, new: str) -> str:
    return f"{old} is called {new} now; rename it (memory limits are bytes, plan.memory_limit)"
