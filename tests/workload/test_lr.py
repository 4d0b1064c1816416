"""Learning rates against their closed forms."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vpipe.errors import ConfigError
from vpipe.workload.lr import POLICIES, learning_rate


@dataclass(frozen=True)
class Settings:
    learning_rate_policy: str
    learning_rate: float = 2.0
    warmup_iterations: int = 4
    end_learning_rate: float = 0.5
    polynomial_power: float = 2.0
    step_size_iterations: int | None = 10
    step_size_epochs: int | None = None
    step_gamma: float = 0.1


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("iteration", "rate"), [(0, 0.4), (0.5, 0.6), (3, 1.6), (4, 2.0)])
def test_warmup_rises_linearly_to_the_full_rate(policy: str, iteration: float, rate: float) -> None:
    assert learning_rate(Settings(policy), iteration, 24) == pytest.approx(rate, rel=1e-15)


@pytest.mark.parametrize(
    ("policy", "rates"),
    [
        # a quarter of the decay, half of it, all of it, and afterwards
        ("constant", (2.0, 2.0, 2.0, 2.0)),
        ("linear", (1.625, 1.25, 0.5, 0.5)),
        ("polynomial", (0.5 + 1.5 * 0.5625, 0.5 + 1.5 * 0.25, 0.5, 0.5)),
        ("cosine", (0.5 + 1.5 * (2 + 2**0.5) / 4, 1.25, 0.5, 0.5)),
        ("step", (2.0, 0.2, 0.02, 0.0002)),
    ],
)
def test_decay(policy: str, rates: tuple[float, ...]) -> None:
    for iteration, rate in zip((9, 14, 24, 40), rates, strict=True):
        assert learning_rate(Settings(policy), iteration, 24) == pytest.approx(rate, rel=1e-14)


@pytest.mark.parametrize("policy", ["linear", "polynomial", "cosine"])
def test_without_warmup_the_first_update_has_the_full_rate_and_the_last_one_still_moves(policy: str) -> None:
    settings = Settings(policy, warmup_iterations=0, end_learning_rate=0.0)
    rates = [learning_rate(settings, iteration, 10) for iteration in range(10)]
    assert rates[0] == 2.0
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_that_is_shorter_than_its_warmup(policy: str) -> None:
    assert [learning_rate(Settings(policy), iteration, 3) for iteration in range(3)] == pytest.approx([0.4, 0.8, 1.2])


def test_fractions_of_an_iteration_move_the_rate() -> None:
    assert learning_rate(Settings("linear"), 9.25, 24) == pytest.approx(2.0 - 1.5 * 5.25 / 20)
    assert learning_rate(Settings("step"), 19.75, 24) == pytest.approx(0.2)


def test_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'exponential' is unknown; choose one of constant, cosine"):
        learning_rate(Settings("exponential"), 0, 1)


def test_steps_counted_in_epochs_as_the_original_did() -> None:
    settings = Settings("step", warmup_iterations=0, step_size_iterations=None, step_size_epochs=30)
    per_epoch = 7
    for iteration in (0, 30 * per_epoch - 1, 30 * per_epoch, 59 * per_epoch, 61 * per_epoch):
        epoch = iteration // per_epoch
        rate = learning_rate(settings, iteration, 90 * per_epoch, per_epoch)
        assert rate == pytest.approx(2.0 * 0.1 ** (epoch // 30), rel=1e-15)


def test_step_needs_its_size() -> None:
    with pytest.raises(ConfigError, match="step_size_iterations is None"):
        learning_rate(Settings("step", step_size_iterations=None), 5, 10)
