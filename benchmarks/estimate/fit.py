"""Fit `matmul_fraction` of the devices: the share of the peak at which the fitted runs are right on average.

    .venv/bin/python -m benchmarks.estimate.fit

Prints the fractions for `vpipe.planner.estimate.devices`; nothing else is fitted.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from benchmarks.estimate.cases import CASES, Case
from benchmarks.estimate.run import count, predict

from vpipe.planner.estimate.analytic import ModelWork
from vpipe.planner.estimate.devices import find_device


def fit(cases: Sequence[tuple[Case, ModelWork]]) -> float:
    """Return the fraction at which the logarithm of estimated over published times is 0 on average."""
    low, high = 0.01, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if statistics.mean(log_error(case, model, middle) for case, model in cases) > 0:
            low = middle
        else:
            high = middle
    return middle


def log_error(case: Case, model: ModelWork, fraction: float) -> float:
    device = dataclasses.replace(find_device(case.device), matmul_fraction={case.dtype: fraction})
    return math.log(predict(case, model, device).step_ms / 1000 / case.published)


def main() -> None:
    fitted = [case for case in CASES if case.is_fitted]
    kinds = dict.fromkeys((case.device.partition("-")[0], case.dtype) for case in fitted)
    for family, dtype in kinds:
        own = [case for case in fitted if case.device.startswith(family) and case.dtype == dtype]
        fraction = fit([(case, count(case)) for case in own])
        print(f"{family} {dtype}: {fraction:.3f}, from {', '.join(case.name for case in own)}")


if __name__ == "__main__":
    main()
