"""How values from other stages enter a stage's graph, and how their gradients leave it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Entrance", "enter_as_leaves", "enter_through_nodes"]


class Entrance(Protocol):
    """The values of one microbatch, and after its backward their gradients."""

    values: dict[str, Tensor]

    def held(self) -> Iterable[Tensor]:
        """Return the values that the graph holds whatever the blocks save."""

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients that there are."""


class _Leaves:
    """Values as leaves: the quickest way, but the graph holds them to its end."""

    def __init__(self, inputs: Mapping[str, Tensor], differentiable: frozenset[str]) -> None:
        self._leaves = {name: value.requires_grad_() for name, value in inputs.items() if name in differentiable}
        self.values = {**inputs}

    def held(self) -> Iterable[Tensor]:
        return self._leaves.values()

    def gradients(self) -> dict[str, Tensor]:
        return {name: leaf.grad for name, leaf in self._leaves.items() if leaf.grad is not None}


class _Nodes:
    """Values behind a node that takes their gradient: when nobody saved them, they can go."""

    def __init__(self, inputs: Mapping[str, Tensor], differentiable: frozenset[str]) -> None:
        self._gradients: dict[str, Tensor] = {}
        gate = torch.empty(0, requires_grad=True)
        self.values = {
            name: _Gate.apply(gate, value, name, self._gradients) if name in differentiable else value  # type: ignore[no-untyped-call]
            for name, value in inputs.items()
        }

    def held(self) -> Iterable[Tensor]:
        return ()

    def gradients(self) -> dict[str, Tensor]:
        return self._gradients


class _Gate(torch.autograd.Function):
    """The identity; what arrives in the backward stays here, laid out in memory as the gradient of a leaf would be."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor, name: str, gradients: dict[str, Tensor]) -> Tensor:
        ctx.name, ctx.gradients, ctx.stride = name, gradients, value.stride()
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        (gradient,) = gradients
        if gradient.stride() != ctx.stride:
            laid_out = torch.empty_strided(gradient.shape, ctx.stride, dtype=gradient.dtype, device=gradient.device)
            gradient = laid_out.copy_(gradient)
        ctx.gradients[ctx.name] = gradient
        return None, None, None, None


def enter_as_leaves(inputs: Mapping[str, Tensor], differentiable: frozenset[str]) -> Entrance:
    """Let `inputs` into a graph, of which those named in `differentiable` need a gradient."""
    return _Leaves(inputs, differentiable)


def enter_through_nodes(inputs: Mapping[str, Tensor], differentiable: frozenset[str]) -> Entrance:
    """Do the same, so that memory under `inputs` can be moved; takes a little longer."""
    return _Nodes(inputs, differentiable)
