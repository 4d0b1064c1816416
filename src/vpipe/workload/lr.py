"""Learning rates as a function of progress.

Progress is counted in iterations and may be fractional. The progress of an update is the number of its first microbatch
divided by `num_microbatches`: in synchronous runs that is the iteration's number, in asynchronous runs with an update
per microbatch it advances by `1 / num_microbatches` from update to update.
"""

from __future__ import annotations

import math
from typing import Protocol

from vpipe.errors import ConfigError

__all__ = ["POLICIES", "LearningRateSettings", "learning_rate"]

POLICIES = ("constant", "cosine", "linear", "polynomial", "step")


class LearningRateSettings(Protocol):
    """What `learning_rate` reads of a run's configuration."""

    @property
    def learning_rate(self) -> float:
        """The rate after warmup."""

    @property
    def learning_rate_policy(self) -> str:
        """One of `POLICIES`."""

    @property
    def warmup_iterations(self) -> int:
        """Iterations over which the rate rises linearly."""

    @property
    def end_learning_rate(self) -> float:
        """Where linear, polynomial and cosine end."""

    @property
    def polynomial_power(self) -> float:
        """Exponent of polynomial; 1 is linear."""

    @property
    def step_size_iterations(self) -> int | None:
        """Iterations between two steps of the policy `step`."""

    @property
    def step_size_epochs(self) -> int | None:
        """Epochs between two such steps, instead of iterations."""

    @property
    def step_gamma(self) -> float:
        """Factor of each such step."""


def learning_rate(
    settings: LearningRateSettings, iteration: float, total_iterations: int, iterations_per_epoch: int = 0
) -> float:
    """Return the learning rate at `iteration` (from 0) of `total_iterations`.

    With W warmup iterations the rate rises as ``(iteration + 1) / (W + 1)``, so the first update already moves and
    iteration W is the first with the full rate. From there linear, polynomial and cosine fall to `end_learning_rate`,
    which they would reach at iteration `total_iterations`. The policy step multiplies by `step_gamma` every
    `step_size_iterations`, or every `step_size_epochs` of `iterations_per_epoch`, counted from iteration 0.

    Raises:
        ConfigError: the policy is unknown, or is step without a step size.
    """
    policy, warmup = settings.learning_rate_policy, settings.warmup_iterations
    if policy not in POLICIES:
        raise ConfigError(f"optimizer.learning_rate_policy '{policy}' is unknown; choose one of {', '.join(POLICIES)}")
    if iteration < warmup:
        return settings.learning_rate * (iteration + 1) / (warmup + 1)
    if policy == "constant":
        return settings.learning_rate
    if policy == "step":
        return settings.learning_rate * settings.step_gamma ** _num_steps(settings, iteration, iterations_per_epoch)
    left = _share_left(iteration - warmup, total_iterations - warmup)
    return settings.end_learning_rate + (settings.learning_rate - settings.end_learning_rate) * _shape(settings, left)


def _num_steps(settings: LearningRateSettings, iteration: float, iterations_per_epoch: int) -> int:
    step_size = settings.step_size_iterations or (settings.step_size_epochs or 0) * iterations_per_epoch
    if not step_size:
        raise ConfigError(
            f"optimizer.step_size_iterations is {settings.step_size_iterations} and optimizer.step_size_epochs is "
            f"{settings.step_size_epochs}; the policy step needs one of them to be at least 1"
        )
    return math.floor(iteration / step_size)


def _share_left(done: float, total: int) -> float:
    """Return which share of the decay is still to come: 1 at its start, 0 at its end and ever after."""
    return min(1.0, max(0.0, 1.0 - done / total)) if total > 0 else 0.0


def _shape(settings: LearningRateSettings, left: float) -> float:
    """Return the policy's curve from 1 (all left) to 0 (nothing left)."""
    if settings.learning_rate_policy == "cosine":
        return (1.0 - math.cos(math.pi * left)) / 2.0
    return left**settings.polynomial_power if settings.learning_rate_policy == "polynomial" else left
