"""Blocks of all kinds have the same bits whether their backward is split or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_pipeline import flat_pipeline
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

WIDTH = 6


class Around(nn.Module):
    """Two linear layers, run by a function of the layers and the input."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **options: Any) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH, **options), nn.Tanh(), nn.Linear(WIDTH, WIDTH, **options))
        self.run = run

    def forward(self, value: Tensor) -> Tensor:
        return self.run(self.inner, value)


def _autocast(inner: nn.Module, value: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return inner(value).float()


def _slope(inner: nn.Module, value: Tensor) -> Tensor:
    probe = value.detach().requires_grad_()
    (slope,) = torch.autograd.grad(inner(probe).square().sum(), probe)
    return inner(value) + slope


def _slope_of_slope(inner: nn.Module, value: Tensor) -> Tensor:
    probe = value.detach().requires_grad_()
    (slope,) = torch.autograd.grad(inner(probe).square().sum(), probe, create_graph=True)
    return inner(value) + slope


def _penalty(inner: nn.Module, value: Tensor) -> Tensor:
    result = inner(value)
    slopes = torch.autograd.grad(result.square().sum(), list(inner.parameters()), create_graph=True)
    return result + sum(slope.square().sum() for slope in slopes)


def _kept_graph(inner: nn.Module, value: Tensor) -> Tensor:
    result = inner(value)
    (slope,) = torch.autograd.grad(result.sum(), inner[0].weight, retain_graph=True)
    return result * slope.detach().mean()


def _tangent(inner: nn.Module, value: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, torch.ones_like(value))
        primal, tangent = forward_ad.unpack_dual(inner(dual))
        return primal + tangent


def _hooked(inner: nn.Module, value: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        return inner(value)


def _doubled_when_saved(inner: nn.Module, value: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor * 2, lambda tensor: tensor):
        return inner(value)


def _jvp(inner: nn.Module, value: Tensor) -> Tensor:
    return sum(torch.func.jvp(inner, (value,), (torch.ones_like(value),)))


def _func_grad(inner: nn.Module, value: Tensor) -> Tensor:
    named = dict(inner.named_parameters())
    slopes = torch.func.grad(lambda own: torch.func.functional_call(inner, own, value).square().sum())(named)
    return inner(value) + slopes["0.bias"]


def _columns(inner: nn.Module, value: Tensor) -> Tensor:
    return inner(value.reshape(-1, 3, WIDTH).transpose(0, 1)).transpose(0, 1).reshape(-1, WIDTH)


def _four(inner: nn.Module, value: Tensor) -> Tensor:
    images = value.reshape(1, -1, 3, WIDTH).permute(0, 2, 1, 3)
    return inner(images).permute(0, 2, 1, 3).reshape(-1, WIDTH)


def _changed_in_place(inner: nn.Module, value: Tensor) -> Tensor:
    result = inner(value.reshape(-1, 3, WIDTH))
    result[:, ::2].mul_(0.5)
    return result.add_(1.0).reshape(-1, WIDTH)


class Functional(nn.Module):
    """Parameters that are used by functions of torch, in ways that no module of torch does."""

    def __init__(self, run: Callable[[nn.Parameter, nn.Parameter, Tensor], Tensor], *bias: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.bias = nn.Parameter(torch.randn(*(bias or (WIDTH,))))
        self.run = run

    def forward(self, value: Tensor) -> Tensor:
        return self.run(self.weight, self.bias, value)


F = nn.functional


def _in_lists(weight: Tensor, bias: Tensor, value: Tensor) -> Tensor:
    both = torch.stack([weight, weight]).mean(0) + torch.cat([weight[:2], weight[2:]])
    return F.linear(value, weight, bias) + F.linear(value, both)


def _foreach(weight: Tensor, bias: Tensor, value: Tensor) -> Tensor:
    (scaled, _) = torch._foreach_mul([weight, bias], 0.5)
    return F.linear(value, weight, bias) + F.linear(value, scaled)


class Scripted(nn.Module):
    """A scripted part that shares its weight with a plain layer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(WIDTH, WIDTH)
        inner = nn.Linear(WIDTH, WIDTH)
        inner.weight = self.plain.weight
        self.scripted = torch.jit.script(inner)

    def forward(self, value: Tensor) -> Tensor:
        return self.plain(value) + self.scripted(value).tanh()


class Own(nn.Parameter):
    """A class of the user's."""


class Convolutions(nn.Module):
    """Convolutions beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(1, 3, 3, padding=1), nn.ConvTranspose1d(3, 1, 3, padding=1)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, value: Tensor) -> Tensor:
        return self.last(self.second(self.first(value.unsqueeze(1)).relu()).squeeze(1))


def own_class() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    layer.weight = Own(layer.weight.detach())
    return layer


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "complex": lambda: Around(lambda inner, value: inner(torch.fft.fft(value)).real, dtype=torch.complex64),
    "double": lambda: Around(lambda inner, value: inner(value.double()).float(), dtype=torch.float64),
    "bfloat16": lambda: Around(lambda inner, value: inner(value.bfloat16()).float(), dtype=torch.bfloat16),
    "autocast": lambda: Around(_autocast),
    "checkpoint": lambda: Around(lambda inner, value: checkpoint(inner, value, use_reentrant=False)),
    "reentrant": lambda: Around(lambda inner, value: checkpoint(inner, value, use_reentrant=True)),
    "sequences": lambda: Around(lambda inner, value: checkpoint(inner, value[:, None], use_reentrant=False)[:, 0]),
    "slope": lambda: Around(_slope),
    "slope of slope": lambda: Around(_slope_of_slope),
    "penalty": lambda: Around(_penalty),
    "kept graph": lambda: Around(_kept_graph),
    "forward derivatives": lambda: Around(_tangent),
    "saved as copies": lambda: Around(_hooked),
    "saved otherwise": lambda: Around(_doubled_when_saved),
    "vmap": lambda: Around(lambda inner, value: torch.vmap(inner)(value)),
    "jvp": lambda: Around(_jvp),
    "gradients of functions": lambda: Around(_func_grad),
    "columns": lambda: Around(_columns),
    "four dimensions": lambda: Around(_four),
    "changed in place": lambda: Around(_changed_in_place),
    "one row": lambda: Around(lambda inner, value: torch.stack([inner(row) for row in value])),
    "every other": lambda: Around(lambda inner, value: inner(value.repeat(1, 2)[:, ::2])),
    "in lists": lambda: Functional(_in_lists),
    "foreach": lambda: Functional(_foreach),
    "broad bias": lambda: Functional(lambda weight, bias, value: F.linear(value, weight, bias), 1),
    "broad sum": lambda: Functional(lambda weight, bias, value: torch.addmm(bias, value, weight), 1),
    "vector": lambda: Functional(lambda weight, bias, value: value * F.linear(value, bias)[:, None] + weight.sum()),
    "scripted": Scripted,
    "own class": own_class,
    "convolutions": Convolutions,
}


def train(build: Callable[[], nn.Module], schedule: str, **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), build(), nn.Linear(WIDTH, WIDTH), build())
    found: dict[str, Tensor] = {}
    with flat_pipeline(
        model,
        nn.functional.mse_loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        schedule=schedule,
        num_microbatches=3,
        **options,
    ) as pipeline:
        for _ in range(2):
            result = pipeline.step(torch.randn(9, WIDTH), torch.randn(9, WIDTH))
            found[f"loss {result.iteration}"] = torch.tensor(result.loss, dtype=torch.float64)
        return found | {name: value.clone() for name, value in pipeline.state_dict().items()}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_split_backward_has_the_bits_of_a_whole_one(name: str) -> None:
    whole = train(BLOCKS[name], "1f1b")
    for schedule, options in (("zb-h1", {}), ("zb-v", {"stages_per_rank": 2})):
        split = train(BLOCKS[name], schedule, **options)
        assert [key for key, value in whole.items() if not torch.equal(value, split[key])] == [], schedule
        assert whole.keys() == split.keys()


def test_forces_reach_through_the_blocks_of_a_stage() -> None:
    """A later block differentiates by what an earlier one of its stage was given, as for energies and forces."""

    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, value: Tensor) -> Tensor:
            return self.inner(value).tanh()

    class Force(nn.Module):
        def __init__(self, energy: Energy) -> None:
            super().__init__()
            self.energy = [energy]
            self.scale = nn.Linear(WIDTH, WIDTH)

        def forward(self, value: Tensor) -> Tensor:
            (force,) = torch.autograd.grad(
                self.scale(value).sum(), value, create_graph=True, retain_graph=True, materialize_grads=True
            )
            return value + force

    def build() -> nn.Module:
        energy = Energy()
        return nn.Sequential(energy, Force(energy))

    whole, split = train(build, "1f1b"), train(build, "zb-h1")
    assert all(torch.equal(value, split[key]) for key, value in whole.items())
