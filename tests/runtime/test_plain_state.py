"""Modules that keep something in plain attributes, in schedules with several weight versions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import vpipe


class _Counts(nn.Module):
    """Multiplies by what grows with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def _next(self) -> float:
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.linear(hidden)) * (1 + self._next() / 10)


class _InBuffer(_Counts):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def _next(self) -> float:
        self.calls += 1
        return self.calls.item()


class _InAttribute(_Counts):
    calls = 0

    def _next(self) -> float:
        self.calls += 1
        return self.calls


class _InList(_Counts):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def _next(self) -> float:
        self.calls.append(1)
        return len(self.calls)


class _InTensor(_Counts):
    def __init__(self) -> None:
        super().__init__()
        self.calls = torch.zeros(())

    def _next(self) -> float:
        self.calls = self.calls + 1
        return self.calls.item()


class _InPlace(_Counts):
    def __init__(self) -> None:
        super().__init__()
        self.calls = torch.zeros(())

    def _next(self) -> float:
        self.calls += 1
        return self.calls.item()


PLANS = {
    "macrobatch": vpipe.Plan("pipedream", num_microbatches=4, macrobatch=True),
    "deep": vpipe.Plan("pipedream", num_microbatches=2, depths=[4], num_ranks=1),
    "2bw": vpipe.Plan("pipedream-2bw", num_microbatches=2),
}


def _losses(kind: Callable[[], nn.Module], plan: vpipe.Plan) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), kind(), nn.Linear(8, 8))
    batches = [(torch.randn(8, 8), torch.randn(8, 8)) for _ in range(4)]
    with vpipe.Pipeline(
        model, nn.functional.mse_loss, plan=plan, optimizer=lambda own: torch.optim.SGD(own, lr=0.1)
    ) as pipeline:
        first = [result.loss for result in pipeline.train(batches)]
        held_out = pipeline.evaluate(batches[:1])["loss"]
        return [*first, held_out, *(result.loss for result in pipeline.train(batches))]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", [_InAttribute, _InList, _InTensor, _InPlace])
def test_all_versions_go_on_from_one_state(kind: Callable[[], nn.Module], plan: str) -> None:
    assert _losses(kind, PLANS[plan]) == _losses(_InBuffer, PLANS[plan])


def test_scripted_modules_run_the_weights_of_their_version() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, hidden: Tensor) -> Tensor:
            return torch.tanh(self.linear(hidden))

    for plan in PLANS.values():
        with torch.jit.optimized_execution(False):
            assert _losses(lambda: torch.jit.script(Plain()), plan) == _losses(Plain, plan)


def test_modules_of_torch_with_lists_of_weights_keep_their_own() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.GRU(8, 8, batch_first=True)

        def forward(self, hidden: Tensor) -> Tensor:
            return self.inner(hidden.unsqueeze(1))[0].squeeze(1)

    losses = _losses(Recurrent, PLANS["deep"])
    assert losses == _losses(Recurrent, PLANS["deep"])
    assert losses[0] != losses[5]
