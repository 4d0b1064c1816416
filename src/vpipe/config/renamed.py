"""Keys of a run that have another name now: the old one still works, with a warning."""

from __future__ import annotations

from vpipe.config.problems import Problem
from vpipe.config.tree import Tree, get_key, remove_key, set_key

__all__ = ["take_old_names"]

_NEW = {"pipeline.memory_limit_microbatches": "pipeline.max_in_flight"}


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
        warnings.append(f"{old} is called {new} now; rename it (memory limits are bytes, plan.memory_limit)")
    return problems, warnings
