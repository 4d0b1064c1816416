"""What one step of training gave."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vpipe.errors import NonFiniteLossError
from vpipe.model.loss import exact_sum
from vpipe.runtime.comm.board import LossBoard
from vpipe.runtime.weights.update import Update

__all__ = ["Outcomes", "Outputs", "StepResult"]

Outputs = Any
"""What the last block wrote: one value, which is a tensor or made of tensors, or several by name."""


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
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What was computed beside the loss, over the batch; NaN where there was nothing to divide by."""
    outputs: Outputs | None = field(default=None, compare=False)
    """Where `train` was asked for them, on the rank of the last stage: what the last block returned for the batch's
    samples, in their order; by name where it writes several values."""


def _ratio(pairs: Iterable[Tensor]) -> float:
    """Return the sums of a metric over the counts beside them; NaN where these are zero."""
    totals, counts = zip(*(pair.tolist() for pair in pairs), strict=True)
    count = exact_sum(counts)
    return exact_sum(totals) / count if count else math.nan


class Outcomes:
    """What batches gave: the loss, which the rank of the last stage tells all others, and what was not applied.

    `parts` names what the loss is the sum of, `metrics` what is told beside it; `update` says if what is not finite
    is an error.
    """

    def __init__(
        self, board: LossBoard, parts: Sequence[str], metrics: Sequence[str], update: Update, *, synchronous: bool
    ) -> None:
        self._board = board
        self._parts = parts
        self._metrics = metrics
        self._synchronous = synchronous
        self._stops = update.on_non_finite == "stop"
        self._told: list[float] = []

    def publish(self, shares: Sequence[Mapping[str, Tensor]], scale: float) -> None:
        """On the rank of the last stage: tell all ranks what the `shares` of a batch add up to, times `scale`.

        A metric is not scaled: its sum is divided by its count.
        """
        values = [exact_sum(share[name].item() for share in shares) * scale for name in self._parts]
        self._board.publish(values + [_ratio(share[name] for share in shares) for name in self._metrics])

    def loss_of_batch(self) -> float:
        """Return the loss of a synchronous batch before its update; it was told before its last gradient was sent."""
        self._told = self._board.collect()
        return exact_sum(self._told[: len(self._parts)])

    def result(
        self, iteration: int, norm: float | None, reasons: Sequence[str], outputs: Outputs | None = None
    ) -> tuple[StepResult, NonFiniteLossError | None]:
        """Return what a batch gave, and why training ends with it if it does.

        `reasons` are those for which updates of this rank's stages were not applied.
        """
        values = self._told if self._synchronous else self._board.collect()
        parts = dict(zip(self._parts, values, strict=False))
        metrics = dict(zip(self._metrics, values[len(parts) :], strict=True))
        skipped = min(len(reasons), 1) if self._synchronous else len(reasons)
        result = StepResult(iteration, exact_sum(parts.values()), parts, norm, skipped, metrics, outputs)
        return result, self._error(result, reasons) if self._stops else None

    def _error(self, result: StepResult, reasons: Sequence[str]) -> NonFiniteLossError | None:
        shown = ", ".join(f"{name} {value}" for name, value in result.parts.items())
        if not math.isfinite(result.loss):
            what = f"the loss became {result.loss} at iteration {result.iteration + 1} ({shown})"
        elif reasons:
            what = f"{reasons[0]} at iteration {result.iteration + 1} (loss {result.loss})"
        else:
            return None
        kept = (
            "weights are those before this batch"
            if self._synchronous
            else "gradients that are not finite were not applied, what was updated before stays"
        )
        return NonFiniteLossError(
            f"{what}; {kept}. Lower the learning rate, warm it up for longer, clip gradients (clip_grad_norm), look "
            "for empty or broken samples, or leave such batches out (on_non_finite: skip)"
        )
