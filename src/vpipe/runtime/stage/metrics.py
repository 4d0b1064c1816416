"""What the last stage computes beside the loss: numbers that are told and have no part in the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vpipe.errors import ModelError
from vpipe.model.chain import Chain
from vpipe.model.loss import CallableLoss, metrics_of, sum_and_count
from vpipe.model.nested import map_tensors, tensors_of
from vpipe.model.rng import seeded
from vpipe.runtime.stage.findings import Findings

__all__ = ["Metrics"]


class Metrics:
    """The metrics of a chain, as sums and what these are divided by, for one microbatch after another."""

    def __init__(self, chain: Chain, findings: Findings) -> None:
        self._loss = chain.loss
        self._parts = set(chain.loss.parts)
        self._own = metrics_of(chain.loss)
        self._measured = chain.measured
        self._findings = findings
        self._place = len(chain) + 1
        """Behind the loss: where their random numbers come from."""

    def call_loss(
        self, values: Mapping[str, Tensor], totals: Mapping[str, float], num_samples: int
    ) -> dict[str, Tensor]:
        """Call the loss; return its parts, and behind them what it tells beside them.

        Raises:
            ModelError: it returns other parts than it names.
        """
        if self._own and isinstance(self._loss, CallableLoss):
            parts, beside = self._loss.with_metrics(values, totals, num_samples)
            return {**parts, **beside}
        parts = self._loss(values, totals, num_samples)
        if parts.keys() != self._parts:
            self._refuse(parts)
        return parts

    def _refuse(self, parts: Mapping[str, Tensor]) -> None:
        named, returned = ", ".join(self._loss.parts), ", ".join(parts) or "nothing"
        raise ModelError(
            f"the loss names the parts {named} and returned {returned}; parts are what is added and trained on, so "
            "name all of them, and give what is only to be told as metrics={name: function}"
        )

    def take(self, called: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take what is told beside the parts out of what `call_loss` returned."""
        return {name: called.pop(name) for name in self._own}

    def measure(
        self, seed_of: Callable[[int], int], values: Mapping[str, Tensor], num_samples: int
    ) -> dict[str, Tensor]:
        """Return sum and count of the metrics that are functions of their own; nothing else is changed by them.

        Raises:
            ModelError: a metric returns something else, or changes in place what it is given.
        """
        if not self._measured:
            return {}
        with torch.no_grad(), seeded(seed_of(self._place)):
            return self._findings.run_seeded(self._place, seed_of, None, lambda: self._call(values, num_samples))

    def _call(self, values: Mapping[str, Tensor], num_samples: int) -> dict[str, Tensor]:
        found = {}
        for name, metric in self._measured.items():
            given = {read: map_tensors(Tensor.detach, values[read]) for read in metric.inputs or ()}
            known = [(read, item, item._version) for read, value in given.items() for item in tensors_of(value)]
            found[name] = sum_and_count(name, metric.function(*given.values()), num_samples)
            for read, item, version in known:
                if item._version != version:
                    raise ModelError(
                        f"metric '{name}' changes '{read}' in place, which others read after it; let it change a copy "
                        "(.clone())"
                    )
        return found
