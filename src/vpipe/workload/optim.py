"""Optimizers by name.

All of them work tensor by tensor (LAMB) or element by element (the others), so that splitting a model's parameters over
stages, each with an optimizer of its own, gives the bits of one optimizer over all of them. That also holds for torch's
fused implementations, which are used wherever the parameters are on a device that has them.

Weight decay applies to parameters with two or more dimensions only: biases and the scales and shifts of normalisation
layers are not decayed, as BERT's authors do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from vpipe.errors import ConfigError

__all__ = ["OPTIMIZERS", "OptimizerSettings", "build_optimizer", "set_learning_rate"]

_FUSED_DEVICES = frozenset({"cpu", "cuda"})


class OptimizerSettings(Protocol):
    """What `build_optimizer` reads of a run's configuration."""

    @property
    def name(self) -> str:
        """One of `OPTIMIZERS`."""

    @property
    def learning_rate(self) -> float:
        """The rate until `set_learning_rate` sets another."""

    @property
    def weight_decay(self) -> float:
        """Decay per update, times the learning rate where it is decoupled (adamw, lamb)."""

    @property
    def momentum(self) -> float:
        """Momentum of sgd."""

    @property
    def betas(self) -> tuple[float, float]:
        """Decay of the running averages of adam, adamw and lamb."""

    @property
    def eps(self) -> float:
        """Added to the denominator of adam, adamw and lamb."""


_Groups = list[dict[str, Any]]


def _adam(groups: _Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, settings.learning_rate, settings.betas, settings.eps, fused=_fused(groups))


def _adamw(groups: _Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, settings.learning_rate, settings.betas, settings.eps, fused=_fused(groups))


def _sgd(groups: _Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, settings.learning_rate, settings.momentum, fused=_fused(groups))


def _lamb(groups: _Groups, settings: OptimizerSettings) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer import Lamb
    except ImportError as error:
        raise ConfigError(
            "optimizer.name 'lamb' needs the package pytorch_optimizer, which is not installed; install it with "
            "`pip install 'pytorch_optimizer>=3.5'`, or choose adam, adamw or sgd"
        ) from error
    # As in the paper's third version: decay inside the trust ratio, and no bias correction, which outside the ratio
    # would make the first updates 1 / (1 - beta1) times as large. No norm over all parameters: it depends on the cuts.
    options: dict[str, Any] = {"weight_decouple": False, "adam_debias": True, "pre_norm": False}
    options |= {"betas": settings.betas, "eps": settings.eps}
    optimizer: torch.optim.Optimizer = Lamb(groups, lr=settings.learning_rate, **options)
    return optimizer


OPTIMIZERS: Mapping[str, Callable[[_Groups, OptimizerSettings], torch.optim.Optimizer]] = {
    "adam": _adam,
    "adamw": _adamw,
    "lamb": _lamb,
    "sgd": _sgd,
}
"""What each name builds: adam (decay added to the gradient), adamw (decoupled decay), lamb, sgd (with momentum)."""


def build_optimizer(
    settings: OptimizerSettings, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """Build the optimizer that `settings` describes for these parameters, which may be none.

    Parameters that decay and those that do not are groups of their own. The names are kept in the optimizer's
    `state_dict`.

    Raises:
        ConfigError: the name is unknown, or its package is not installed.
    """
    if settings.name not in OPTIMIZERS:
        raise ConfigError(f"optimizer.name '{settings.name}' is unknown; choose one of {', '.join(OPTIMIZERS)}")
    named = list(named_parameters)
    decayed = [item for item in named if item[1].ndim >= 2]
    spared = [item for item in named if item[1].ndim < 2]
    groups: _Groups = []
    if decayed or not spared:
        groups.append({"params": decayed, "weight_decay": settings.weight_decay})
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    return OPTIMIZERS[settings.name](groups, settings)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use `learning_rate` from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _fused(groups: _Groups) -> bool | None:
    """Return True where torch fuses the update on every parameter's device, None to leave the choice to torch."""
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    usable = all(item.device.type in _FUSED_DEVICES and item.is_floating_point() for item in parameters)
    return True if parameters and usable else None
