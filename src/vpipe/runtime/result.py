"""What one step of training gave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vpipe.errors import NonFiniteLossError

__all__ = ["StepResult"]


@dataclass(frozen=True)
class StepResult:
    """What one batch gave; the same on every rank, but for the norm in asynchronous schedules."""

    iteration: int
    """Batches done before this one."""
    loss: float
    parts: Mapping[str, float]
    """What the loss is the sum of."""
    gradient_norm: float | None
    """Before clipping, over all stages; in asynchronous schedules of this rank's stage. None without clipping."""

    def check_finite(self) -> None:
        """Raise NonFiniteLossError when training has broken down."""
        if not math.isfinite(self.loss):
            shown = ", ".join(f"{name} {value}" for name, value in self.parts.items())
            raise NonFiniteLossError(
                f"the loss became {self.loss} at iteration {self.iteration + 1} ({shown}); lower the learning rate, "
                "warm it up for longer, clip gradients (clip_grad_norm), or look for empty or broken samples"
            )
