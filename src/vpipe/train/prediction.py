"""What was predicted of a run, beside what it really took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vpipe.plan.prediction import Prediction

__all__ = ["compare_prediction"]


def compare_prediction(
    prediction: Prediction | None, iteration_ms: float, memory_bytes: Sequence[int] | None
) -> dict[str, Any]:
    """Return predicted and measured figures under `prediction`; nothing for a run that was not planned.

    Args:
        prediction: what the planner expected.
        iteration_ms: the mean time of an iteration.
        memory_bytes: the most that each rank held by its ledger; None where it was not kept.
    """
    if prediction is None:
        return {}
    found: dict[str, Any] = {"step_ms": _compared(prediction.step_ms, iteration_ms)}
    if memory_bytes is not None:
        totals = [kinds["total"] for kinds in prediction.memory_bytes]
        found["memory_bytes"] = [
            _compared(total, measured) for total, measured in zip(totals, memory_bytes, strict=True)
        ]
    return {"prediction": found}


def _compared(predicted: float, measured: float) -> dict[str, float | None]:
    """Return both, and predicted over measured less 1."""
    error = predicted / measured - 1 if measured else None
    return {"predicted": predicted, "measured": measured, "error": error}
