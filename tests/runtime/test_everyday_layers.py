"""Layers that do not run on the meta device as they are: a cut behind them is found in another way."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vpipe
from vpipe.model.rng import derive_seed


class _Layer(nn.Module):
    """A linear layer and what a test does behind it."""

    def __init__(self, extra: Callable[[_Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.places = nn.Embedding(9, 6)
        self.plain = torch.ones(6, 6).tril()
        self.kept: Tensor | None = None
        self.by_size: dict[int, Tensor] = {}
        self.average = 0.0
        self._extra = extra

    def forward(self, hidden: Tensor) -> Tensor:
        return self._extra(self, self.linear(hidden))


@functools.lru_cache
def _mask(size: int) -> Tensor:
    return torch.ones(size, size).tril()


def _keep(layer: _Layer, hidden: Tensor) -> Tensor:
    if layer.kept is None:
        layer.kept = torch.arange(hidden.shape[-1])
    return hidden * layer.kept


def _keep_by_size(layer: _Layer, hidden: Tensor) -> Tensor:
    if len(hidden) not in layer.by_size:
        layer.by_size[len(hidden)] = torch.linspace(0, 1, hidden.shape[-1])
    return hidden * layer.by_size[len(hidden)]


def _average(layer: _Layer, hidden: Tensor) -> Tensor:
    layer.average = 0.9 * layer.average + 0.1 * hidden.mean().item()
    return hidden - 0.1 * torch.tanh(hidden)


def _check(layer: _Layer, hidden: Tensor) -> Tensor:
    assert hidden.isfinite().all()
    assert (hidden.detach().numpy() < 100).all()
    return hidden


def _halve(layer: _Layer, hidden: Tensor) -> Tensor:
    while hidden.norm() > 1:
        hidden = hidden / 2
    return hidden


def _tell(layer: _Layer, hidden: Tensor) -> Tensor:
    print("mean", hidden.mean().item())
    return hidden


def _scatter(layer: _Layer, hidden: Tensor) -> Tensor:
    chosen = (hidden.detach().sum(-1) > 0).nonzero().flatten()
    return hidden.index_add(0, chosen, hidden[chosen])


def _distinct(layer: _Layer, hidden: Tensor) -> Tensor:
    values, place = hidden.detach().round().unique(return_inverse=True)
    return hidden + values[place]


def _drop(layer: _Layer, hidden: Tensor) -> Tensor:
    return hidden if random.random() < 0.5 else hidden * np.float32(hidden.sum().item() > 0)


def _lower(layer: _Layer, hidden: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer.linear(hidden)


LAYERS: dict[str, Callable[[_Layer, Tensor], Tensor]] = {
    "arange": lambda layer, hidden: hidden + layer.places(torch.arange(hidden.shape[0])),
    "zeros": lambda layer, hidden: torch.cat([torch.zeros(len(hidden), 2), hidden[:, 2:]], 1),
    "full of a size": lambda layer, hidden: hidden @ torch.full((6, 6), 0.1),
    "tensor of numbers": lambda layer, hidden: hidden * torch.tensor([1.0, 2, 3, 4, 5, 6]),
    "plain attribute": lambda layer, hidden: hidden @ layer.plain,
    "numpy": lambda layer, hidden: hidden * torch.from_numpy(np.abs(hidden.detach().numpy())),
    "item": lambda layer, hidden: hidden * 2 if hidden.sum().item() > 0 else hidden,
    "branch": lambda layer, hidden: hidden * 2 if hidden.sum() > 0 else hidden,
    "assert": _check,
    "loop": _halve,
    "nonzero": _scatter,
    "unique": _distinct,
    "print": _tell,
    "cache": _keep,
    "cache by size": _keep_by_size,
    "function's cache": lambda layer, hidden: hidden @ _mask(6),
    "plain state": _average,
    "drop by random": _drop,
    "double": lambda layer, hidden: hidden.double() * torch.arange(6, dtype=torch.float64),
    "autocast": _lower,
}


class _Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden.float())


def _modules(name: str) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), _Layer(LAYERS[name]), nn.Tanh(), _Last())


def test_autocast_around_the_training_sees_every_update() -> None:
    inputs, targets = torch.randn(4, 8, 4), torch.randn(4, 8, 3)
    plan = vpipe.Plan("pipedream", num_microbatches=1, stages_per_rank=1)
    batches = list(zip(inputs, targets, strict=True))

    def losses(*, around: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
        with vpipe.Pipeline(
            model, nn.functional.mse_loss, plan=plan, optimizer=lambda own: torch.optim.SGD(own, lr=0.1)
        ) as pipeline:
            if around:
                with torch.autocast("cpu", torch.bfloat16):
                    return [result.loss for result in pipeline.train(batches)]
            found = []
            for batch in batches:
                with torch.autocast("cpu", torch.bfloat16):
                    found.append(pipeline.step(batch).loss)
            return found

    assert losses(around=True) == losses(around=False)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_crosses_is_what_the_layer_gives(name: str, device: str) -> None:
    model, inputs = _modules(name), torch.randn(4, 4)
    (spec,) = vpipe.Chain.from_modules(model, nn.functional.mse_loss).infer([2], {"input": inputs.to(device)})[2]
    given = model[:2](inputs)
    assert (spec.shape, spec.dtype, spec.requires_grad) == (tuple(given.shape), given.dtype, given.requires_grad)


@pytest.mark.parametrize("name", LAYERS)
def test_a_cut_behind_such_a_layer_gives_the_bits_of_a_plain_loop(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, targets = torch.randn(3, 8, 4), torch.randn(3, 8, 3)
    model = _modules(name)
    plan = vpipe.Plan("naive", num_microbatches=2, stages_per_rank=4)
    random_before, user_before = random.getstate(), vars(model[1]).copy()
    with vpipe.Pipeline(
        model, nn.functional.mse_loss, plan=plan, optimizer=lambda own: torch.optim.SGD(own, lr=0.1)
    ) as p:
        losses = [p.step(x, y).loss for x, y in zip(inputs, targets, strict=True)]
        state = p.state_dict()
    assert random.getstate() == random_before
    assert vars(model[1]) == user_before
    assert capsys.readouterr().out.count("mean") == (6 if name == "print" else 0)

    plain = _modules(name)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    own = []
    for iteration, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        parts = []
        for microbatch in range(2):
            rows = slice(4 * microbatch, 4 * microbatch + 4)
            hidden = x[rows]
            for index, module in enumerate(plain):
                seed = derive_seed(0, "dropout", iteration, microbatch, index)
                random.seed(seed)
                hidden = module(hidden)
            loss = nn.functional.mse_loss(hidden, y[rows]) * 0.5
            loss.backward()
            parts.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        own.append(sum(parts))
    assert losses == pytest.approx(own, rel=1e-6)
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
