"""How values from other stages enter a stage's graph, and how their gradients leave it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from vpipe.runtime.memory.strides import laid_out

__all__ = ["Entrance", "enter_as_leaves", "enter_through_nodes"]


class Entrance(Protocol):
    """The values of one microbatch, and after its backward their gradients."""

    values: dict[str, Tensor]

    def held(self) -> Iterable[Tensor]:
        """Return the values that the graph holds whatever the blocks save."""

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients that there are."""


class _Leaves:
    """Values as leaves: the quickest way, but the graph holds them to its end.

    Torch lays a leaf's gradient out as the leaf. The stage before gets it as the backward made it: the kernels there
    would round differently.
    """

    def __init__(self, inputs: Mapping[str, Tensor], differentiable: frozenset[str]) -> None:
        self._leaves = {name: value.requires_grad_() for name, value in inputs.items() if name in differentiable}
        self._strides: dict[str, tuple[int, ...]] = {}
        for name, leaf in self._leaves.items():
            # As register_hook does it, which takes several times as long. A leaf that knows this object, which knows
            # the leaf, would hold the message's memory for long.
            leaf._backward_hooks = {0: partial(_note, self._strides, name)}
        self.values = {**inputs}

    def held(self) -> Iterable[Tensor]:
        return self._leaves.values()

    def gradients(self) -> dict[str, Tensor]:
        return {
            name: _as_made(leaf.grad, self._strides[name])
            for name, leaf in self._leaves.items()
            if leaf.grad is not None
        }


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
    """The identity; what arrives in the backward stays here."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor, name: str, gradients: dict[str, Tensor]) -> Tensor:
        ctx.name, ctx.gradients = name, gradients
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        (ctx.gradients[ctx.name],) = gradients
        return None, None, None, None


def _note(strides: dict[str, tuple[int, ...]], name: str, gradient: Tensor) -> None:
    strides[name] = gradient.stride()


def _as_made(gradient: Tensor, stride: tuple[int, ...]) -> Tensor:
    return gradient if gradient.stride() == stride else laid_out(gradient, stride)


def enter_as_leaves(inputs: Mapping[str, Tensor], differentiable: frozenset[str]) -> Entrance:
    """Let `inputs` into a graph, of which those named in `differentiable` need a gradient."""
    return _Leaves(inputs, differentiable)


def enter_through_nodes(inputs: Mapping[str, Tensor], differentiable: frozenset[str]) -> Entrance:
    """Do the same, so that memory under `inputs` can be moved; takes a little longer."""
    return _Nodes(inputs, differentiable)
