"""Optimizers: what they compute, and that splitting parameters over several of them changes no bit."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from vpipe.errors import ConfigError
from vpipe.workload.optim import OPTIMIZERS, build_optimizer, set_learning_rate


@dataclass(frozen=True)
class Settings:
    name: str
    learning_rate: float = 0.01
    weight_decay: float = 0.1
    momentum: float = 0.9
    betas: tuple[float, float] = (0.8, 0.95)
    eps: float = 1e-6


SHAPES = [(64, 48), (48,), (33, 7), (5,), (3, 3, 3), (1,), (), (129, 65)]
NAMES = [f"block{index}.weight" for index in range(len(SHAPES))]


def _parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def _gradients(update: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + update)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _train(settings: Settings, split: list[list[int]], num_updates: int = 4) -> list[Tensor]:
    parameters = _parameters()
    optimizers = [build_optimizer(settings, [(NAMES[i], parameters[i]) for i in part]) for part in split]
    for update in range(num_updates):
        for parameter, gradient in zip(parameters, _gradients(update), strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("split", [[[0, 1], [2, 3, 4], [5, 6, 7]], [[index] for index in range(len(SHAPES))]])
def test_splitting_parameters_over_optimizers_changes_no_bit(name: str, split: list[list[int]]) -> None:
    whole = _train(Settings(name), [list(range(len(SHAPES)))])
    parts = _train(Settings(name), split)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_number_of_threads_changes_no_bit(name: str) -> None:
    everything = [list(range(len(SHAPES)))]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _train(Settings(name), everything)
        torch.set_num_threads(2)
        two = _train(Settings(name), everything)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_agrees_with_torch_by_its_plain_implementation(name: str) -> None:
    settings = Settings(name)
    plain = {
        "adam": lambda p, decay: torch.optim.Adam(p, 0.01, (0.8, 0.95), 1e-6, decay, foreach=False),
        "adamw": lambda p, decay: torch.optim.AdamW(p, 0.01, (0.8, 0.95), 1e-6, decay, foreach=False),
        "sgd": lambda p, decay: torch.optim.SGD(p, 0.01, 0.9, weight_decay=decay, foreach=False),
    }[name]
    expected = _parameters()
    optimizers = [plain([parameter], 0.1 if parameter.ndim >= 2 else 0.0) for parameter in expected]
    for update in range(4):
        for parameter, gradient in zip(expected, _gradients(update), strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    for got, want in zip(_train(settings, [list(range(len(SHAPES)))]), expected, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-5, atol=1e-6)


def test_lamb_follows_the_paper() -> None:
    parameter = nn.Parameter(torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    gradient = torch.tensor([[0.5, -1.0], [0.25, 2.0]])
    optimizer = build_optimizer(Settings("lamb"), [("w", parameter)])
    before, parameter.grad = parameter.detach().clone(), gradient.clone()
    optimizer.step()
    update = (0.2 * gradient) / ((0.05 * gradient**2).sqrt() + 1e-6) + 0.1 * before
    trust = before.norm() / update.norm()
    torch.testing.assert_close(parameter.detach(), before - 0.01 * trust * update)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_parameters_with_two_dimensions_decay(name: str) -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(Settings(name), [("matrix", matrix), ("vector", vector)])
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert (matrix < 1).all()
    assert (vector == 1).all()


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_fused_implementation_is_used_where_there_is_one(name: str) -> None:
    on_cpu = build_optimizer(Settings(name), [("w", nn.Parameter(torch.ones(2, 2)))])
    assert all(group["fused"] for group in on_cpu.param_groups)
    on_meta = build_optimizer(Settings(name), [("w", nn.Parameter(torch.ones(2, 2, device="meta")))])
    assert not any(group["fused"] for group in on_meta.param_groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_stage_without_parameters_gets_an_optimizer_too(name: str) -> None:
    build_optimizer(Settings(name), []).step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_keeps_names_and_comes_back(name: str) -> None:
    optimizer = build_optimizer(Settings(name), zip(NAMES, _parameters(), strict=True))
    for parameter, gradient in zip(_parameters(), _gradients(0), strict=True):
        parameter.grad = gradient
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    assert sorted(names) == NAMES
    build_optimizer(Settings(name), zip(NAMES, _parameters(), strict=True)).load_state_dict(state)


def test_set_learning_rate_reaches_every_group() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    bias = nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(Settings("sgd", weight_decay=0.0), [("w", parameter), ("b", bias)])
    set_learning_rate(optimizer, 0.5)
    parameter.grad, bias.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step()
    assert (parameter == 0.5).all()
    assert (bias == 0.5).all()


def test_unknown_optimizer_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'adagrad' is unknown; choose one of adam, adamw, lamb, sgd"):
        build_optimizer(Settings("adagrad"), [])


def test_missing_lamb_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ConfigError, match=r"pip install 'pytorch_optimizer"):
        build_optimizer(Settings("lamb"), [("w", nn.Parameter(torch.ones(1)))])
