"""What one step of training gave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vpipe.errors import NonFiniteLossError

__all__ = ["StepResult", "non_finite_error"]


@dataclass(frozen=True)
class StepResult:
    """What one batch gave; the same on every rank, but for norm and skipped updates in asynchronous schedules."""

    iteration: int
    """Batches done before this one."""
    loss: float
    parts: Mapping[str, float]
    """What the loss is the sum of."""
    gradient_norm: float | None
    """Before clipping, over all stages; in asynchronous schedules of this rank's stage. None where it is not taken."""
    num_skipped: int = 0
    """Updates that were not applied because their loss or a gradient was not finite: in a synchronous schedule 1 for
    all stages, in an asynchronous one those of this rank's stages."""


def non_finite_error(result: StepResult, reasons: Sequence[str], *, synchronous: bool) -> NonFiniteLossError | None:
    """Return why training does not go on after a batch, if `reasons` kept updates of it from being applied."""
    shown = ", ".join(f"{name} {value}" for name, value in result.parts.items())
    if not math.isfinite(result.loss):
        what = f"the loss became {result.loss} at iteration {result.iteration + 1} ({shown})"
    elif reasons:
        what = f"{reasons[0]} at iteration {result.iteration + 1} (loss {result.loss})"
    else:
        return None
    kept = (
        "weights are those before this batch"
        if synchronous
        else "gradients that are not finite were not applied, what was updated before stays"
    )
    return NonFiniteLossError(
        f"{what}; {kept}. Lower the learning rate, warm it up for longer, clip gradients (clip_grad_norm), look for "
        "empty or broken samples, or leave such batches out (on_non_finite: skip)"
    )
