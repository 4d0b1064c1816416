"""What was predicted of a run, beside what it really took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["compare_prediction", "keep_prediction"]

_KEPT = ("predicted", "profile")


def keep_prediction(plan: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a plan file says beyond what the run itself knows."""
    return {} if plan is None else {key: plan[key] for key in _KEPT if key in plan}


def compare_prediction(
    plan: Mapping[str, Any] | None, iteration_ms: float, memory_bytes: Sequence[int] | None
) -> dict[str, Any]:
    """Return predicted and measured figures under `prediction`; nothing for a run that was not planned.

    Args:
        plan: what the planner decided, as in a plan file.
        iteration_ms: the mean time of an iteration.
        memory_bytes: the most that each rank held by its ledger; None where it was not kept.
    """
    if plan is None:
        return {}
    predicted = plan["predicted"]
    found = {"step_ms": _compared(predicted["step_ms"], iteration_ms)}
    if memory_bytes is None:
        return {"prediction": found}
    totals = [memory["total"] for memory in predicted["memory_bytes"]]
    ranks = [_compared(total, measured) for total, measured in zip(totals, memory_bytes, strict=True)]
    return {"prediction": {**found, "memory_bytes": ranks}}


def _compared(predicted: float, measured: float) -> dict[str, float | None]:
    """Return both, and predicted over measured less 1."""
    error = predicted / measured - 1 if measured else None
    return {"predicted": predicted, "measured": measured, "error": error}
