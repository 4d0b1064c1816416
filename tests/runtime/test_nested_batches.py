"""Batches whose fields are dictionaries, lists and dataclasses of tensors, and have more than the model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vpipe
from vpipe.errors import DataError, ModelError


@dataclass
class Inputs:
    hidden: Tensor
    extras: dict[str, Any]


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, given: Inputs) -> tuple[Tensor, Tensor | None]:
        hidden = self.linear(given.hidden) * given.extras["scale"]
        mask, (shift,) = given.extras["mask"], given.extras["shift"]
        return (hidden if mask is None else hidden * mask) + shift, mask


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, given: tuple[Tensor, Tensor | None]) -> dict[str, Tensor]:
        return {"logits": self.linear(given[0])}


def _loss(outputs: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    return nn.functional.mse_loss(outputs["logits"], target["y"])


def _largest(outputs: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    return (outputs["logits"].argmax(1) == target["y"].argmax(1)).float().mean()


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(First(), Last())


def _batches(*, masked: bool) -> Iterator[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    for size in (8, 6, 3):
        hidden, shift = torch.randn(size, 4, generator=generator), torch.randn(size, 6, generator=generator)
        mask = (torch.rand(size, 6, generator=generator) > 0.3).float() if masked else None
        given = Inputs(hidden, {"scale": 2.0, "mask": mask, "shift": [shift]})
        yield {"input": given, "target": {"y": torch.randn(size, 3, generator=generator)}, "names": ["a"] * size}


def _loop(*, masked: bool) -> tuple[list[float], dict[str, Tensor]]:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for batch in _batches(masked=masked):
        given, target, total = batch["input"], batch["target"]["y"], 0.0
        parts = torch.arange(len(target)).tensor_split(4)
        for rows in [part for part in parts if len(part)]:
            extras = given.extras
            mask = None if extras["mask"] is None else extras["mask"][rows]
            part = Inputs(given.hidden[rows], {"scale": 2.0, "mask": mask, "shift": [extras["shift"][0][rows]]})
            loss = _loss(model(part), {"y": target[rows]}) * (len(rows) / len(target))
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, model.state_dict()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("schedule", ["naive", "gpipe", "zb-h1"])
def test_nested_fields_are_cut_as_a_loop_cuts_them(schedule: str, masked: bool) -> None:
    stages = {"stages_per_rank": 2} if schedule == "naive" else {}
    plan = vpipe.Plan(schedule, num_microbatches=4, **stages)
    with vpipe.Pipeline(
        _model(), _loss, plan=plan, metrics={"hits": _largest}, optimizer=lambda own: torch.optim.SGD(own, lr=0.1)
    ) as pipeline:
        results = list(pipeline.train(_batches(masked=masked)))
        held_out = pipeline.evaluate(_batches(masked=masked))["loss"]
        (first, *_) = pipeline.predict(_batches(masked=masked))
        state = pipeline.state_dict()
    expected, weights = _loop(masked=masked)
    assert [result.loss for result in results] == pytest.approx(expected, rel=1e-6)
    assert all(0 <= result.metrics["hits"] <= 1 for result in results)
    assert all(torch.equal(value, state[name]) for name, value in weights.items())
    assert held_out > 0
    assert first["logits"].shape == (8, 3)


def _pipeline(loss: Callable[..., Tensor]) -> vpipe.Pipeline:
    plan = vpipe.Plan("gpipe", num_microbatches=2)
    return vpipe.Pipeline(_model(), loss, plan=plan, optimizer=lambda own: torch.optim.SGD(own, lr=0.1))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"target": [1.0] * 8}, "'target' has a list of 8 items that are no tensors; make it a tensor"),
        ({"target": {"y": torch.ones(7, 3)}}, r"'target\['y'\]' has 7 rows in a batch of 8 samples"),
        ({"target": {"y": torch.tensor(1.0)}}, r"'target\['y'\]' is a number"),
        ({"target": {"y": object()}}, "'target' is of type dict, or has something in it that is no tensor"),
    ],
)
def test_what_cannot_be_cut_is_named(change: dict[str, Any], text: str) -> None:
    batch = next(_batches(masked=True)) | change
    with (
        _pipeline(_loss) as pipeline,
        pytest.raises(DataError, match=text),
    ):
        pipeline.step(batch)


def test_a_misspelt_field_is_still_an_error() -> None:
    batch = next(_batches(masked=True))
    batch["targets"] = batch.pop("target")
    with (
        _pipeline(_loss) as pipeline,
        pytest.raises(DataError, match="a field 'names' that the model does not read"),
    ):
        pipeline.step(batch)


def test_a_loss_of_nested_values_that_is_no_mean_is_found() -> None:
    def summed(outputs: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
        return (outputs["logits"] - target["y"]).square().sum()

    with (
        _pipeline(summed) as pipeline,
        pytest.raises(ModelError, match=r"the loss is no mean over samples.*their sum is right"),
    ):
        pipeline.step(next(_batches(masked=True)))
