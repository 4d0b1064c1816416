"""Each part of a model trains in the mode that its user gave it, and is evaluated in evaluation mode."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_pipeline import flat_pipeline
from torch import Tensor, nn

from vpipe.errors import DataError
from vpipe.model.chain import Chain
from vpipe.model.loss import CallableLoss
from vpipe.runtime.pipeline import Pipeline
from vpipe.verify.reference import Reference

WIDTH = 6


class Merging(nn.Module):
    """Adds to its weight for evaluations what it keeps apart for training, as adapters do, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH, WIDTH))
        self.extra = nn.Parameter(torch.rand(WIDTH, WIDTH))
        self.is_merged, self.num_switches = False, 0

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.is_merged == mode:
            self.weight.data += -self.extra.data if mode else self.extra.data
            self.is_merged, self.num_switches = not mode, self.num_switches + 1
        return self

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight if self.is_merged else self.weight + self.extra)


class Skipping(nn.Module):
    """Is left out now and then in training, by Python's own random numbers; in its user's model it always trains."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and random.random() < 0.5 else self.inner(x)


def mixed() -> nn.Sequential:
    """Norms that are frozen and not, one in a nested part, and dropout that is off."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5), nn.Dropout(0.2))
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), inner, nn.BatchNorm1d(WIDTH), Merging())
    for norm in (part for part in model.modules() if isinstance(part, nn.BatchNorm1d)):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    model[1].eval().requires_grad_(False)
    inner[1].eval()
    inner[2].eval()
    return model


def whole() -> nn.Sequential:
    return mixed().eval()


def skipping() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(Skipping(), nn.Tanh()), nn.Linear(WIDTH, WIDTH))
    model[1].eval()
    model[1][0].train()
    return model


def batches(number: int = 3) -> list[tuple[Tensor, Tensor]]:
    made = []
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        made.append((torch.randn(8, WIDTH, generator=generator), torch.randn(8, WIDTH, generator=generator)))
    return made


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def pipeline_of(model: nn.Sequential, **options: Any) -> Pipeline:
    return flat_pipeline(model, nn.functional.mse_loss, optimizer=sgd, num_microbatches=4, **options)


@pytest.mark.parametrize("make", [mixed, whole, skipping])
@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "1f1b"},
        {"schedule": "zb-h1"},
        {"schedule": "gpipe", "recompute_ratio": 1.0},
        {"schedule": "interleaved", "stages_per_rank": 3},
    ],
    ids=lambda options: options["schedule"],
)
def test_training_and_evaluation_are_those_of_one_process(
    make: Callable[[], nn.Sequential], options: dict[str, Any]
) -> None:
    oracle = Reference(Chain.from_modules(make(), CallableLoss(nn.functional.mse_loss)), sgd)
    with pipeline_of(make(), **options) as pipeline:
        modes = [part.training for held in pipeline.held.values() for part in held.weights.newest.modules()]
        for number, (x, y) in enumerate(batches()):
            pieces = [{"input": x[at : at + 2], "target": y[at : at + 2]} for at in range(0, 8, 2)]
            random.seed(number)  # of no account
            assert pipeline.evaluate([(x, y)], 2) == oracle.evaluate(pieces)
            assert pipeline.step(x, y).parts == oracle.train_batch(pieces).batch_parts(4)[0]
        assert modes == [part.training for held in pipeline.held.values() for part in held.weights.newest.modules()]
        state = pipeline.state_dict()
    expected = oracle.parameters() | oracle.buffers()
    assert {name for name in state if not torch.equal(state[name], expected[name])} == set()


def test_a_plain_loop_agrees() -> None:
    model = mixed()
    model[2][3].eval()  # the only part that would draw random numbers
    with pipeline_of(model, schedule="zb-h1") as pipeline:
        losses = [result.loss for result in pipeline.train(batches())]
        state = pipeline.state_dict()
    plain = mixed()
    plain[2][3].eval()
    optimizer = sgd([item for item in plain.parameters() if item.requires_grad])
    for number, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        parts = [nn.functional.mse_loss(plain(x[at : at + 2]), y[at : at + 2]) / 4 for at in range(0, 8, 2)]
        for part in parts:
            part.backward()
        optimizer.step()
        assert losses[number] == pytest.approx(sum(part.item() for part in parts), rel=1e-12)
    assert all(torch.equal(state[name], item) for name, item in plain.state_dict().items())


def test_a_part_with_a_switch_of_its_own_is_told_once_each_way() -> None:
    with pipeline_of(mixed(), schedule="1f1b") as pipeline:
        part = pipeline.held[0].weights.newest[4]
        assert isinstance(part, Merging)
        pipeline.evaluate(batches(2))
        assert (part.num_switches, part.is_merged, part.training) == (2, False, True)
        with pytest.raises(DataError):
            pipeline.evaluate([(None, None)])  # type: ignore[list-item]
        assert (part.num_switches, part.is_merged, part.training) == (4, False, True)
