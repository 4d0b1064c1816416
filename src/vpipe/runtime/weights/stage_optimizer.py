"""The optimizer of one stage, or several that share its parameters out among them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from vpipe.errors import ConfigError
from vpipe.model.rng import seeded

__all__ = ["Named", "OptimizerFactory", "StageOptimizer", "refuse_coupled"]

Named = list[tuple[str, nn.Parameter]]

OptimizerFactory = Callable[[Named], torch.optim.Optimizer | Sequence[torch.optim.Optimizer]]
"""Makes the optimizer of one stage, or several, from its (name, parameter) pairs, which torch's optimizers take."""

_TRIES = 3


class StageOptimizer:
    """Steps what a factory made of a stage's (name, parameter) pairs.

    Raises:
        ConfigError: that is not one or more optimizers of these parameters.
    """

    def __init__(self, factory: OptimizerFactory, named: Named) -> None:
        self.optimizers = _build(factory, named)
        self._own_rates = [float(group.get("lr") or 0.0) for group in self.param_groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """Return what all optimizers keep for each parameter."""
        return {item: kept for optimizer in self.optimizers for item, kept in optimizer.state.items()}

    def usual_rates(self) -> tuple[float, float]:
        """Return the largest rate of an optimizer that a group of it has, and the largest of all groups; or 0."""
        usual = [
            float(optimizer.defaults["lr"])
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            if "lr" in optimizer.defaults and group.get("lr") == optimizer.defaults["lr"]
        ]
        return max(usual, default=0.0), max(self._own_rates, default=0.0)

    def set_rate(self, rate: float, usual: float) -> None:
        """Set the learning rate; groups that were made with another one than `usual` keep the ratio to that."""
        for group, own in zip(self.param_groups, self._own_rates, strict=True):
            group["lr"] = rate if own == usual or not usual else rate * (own / usual)

    def step(self) -> None:
        """Update the parameters by their gradients."""
        for optimizer in self.optimizers:
            _step(optimizer)


def _build(factory: OptimizerFactory, named: Named) -> list[torch.optim.Optimizer]:
    try:
        made = factory(list(named))
    except (AttributeError, TypeError) as error:
        if "tuple" not in str(error):
            raise
        raise ConfigError(
            f"the optimizer function failed: {error}. It is given the (name, parameter) pairs of a stage, which "
            "torch's optimizers take as they are; to choose among them, write [parameter for name, parameter in pairs "
            "if ...]"
        ) from error
    except ValueError as error:
        if "empty parameter list" not in str(error):
            raise
        raise ConfigError(
            f"the optimizer function failed: {error}. It is called for each stage, and this one has no such parameters "
            f"(it has {', '.join(name for name, _ in named)}); leave optimizers of no parameters out of the list that "
            "it returns"
        ) from error
    given = list(made) if isinstance(made, list | tuple) else [made]
    optimizers = [item for item in given if isinstance(item, torch.optim.Optimizer)]
    if not given or len(optimizers) < len(given):
        raise ConfigError(
            f"the optimizer function returned {type(made).__name__}, not a torch.optim.Optimizer; give a function of "
            "a stage's parameters that returns one, or a list of some, e.g. lambda parameters: "
            "torch.optim.SGD(parameters, lr=0.1)"
        )
    _check_parameters(optimizers, named)
    return optimizers


def _check_parameters(optimizers: Sequence[torch.optim.Optimizer], named: Named) -> None:
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise ConfigError("LBFGS runs the model several times per step, which a pipeline cannot; use another optimizer")
    names = {id(parameter): name for name, parameter in named}
    seen: set[int] = set()
    for optimizer in optimizers:
        for parameter in (item for group in optimizer.param_groups for item in group["params"]):
            if id(parameter) not in names:
                raise ConfigError(
                    "the optimizer holds parameters that are not of its stage; make it of the (name, parameter) pairs "
                    "that the optimizer function is given, and of nothing else"
                )
            if id(parameter) in seen:
                raise ConfigError(
                    f"'{names[id(parameter)]}' is in two of the optimizers that the function returned; share the "
                    "parameters out among them"
                )
            seen.add(id(parameter))


def refuse_coupled(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Refuse an optimizer in which one parameter's step depends on another's gradient: each stage has its own.

    Copies of it step small parameters, once all together and once one of them alone.

    Raises:
        ConfigError: there is such an optimizer, as those that have one step size for all parameters.
    """
    for optimizer in optimizers:
        try:
            together, alone = (_try_steps(optimizer, is_alone=is_alone) for is_alone in (False, True))
        except Exception:
            continue  # it does not take parameters of other sizes, or cannot be copied
        if not torch.allclose(together, alone, rtol=1e-4, atol=1e-7, equal_nan=True):
            kind = type(optimizer).__name__
            raise ConfigError(
                f"the optimizer {kind} changes a parameter by the gradients of others, and every stage has an "
                "optimizer of its own, so the result would depend on the cuts; use one that works parameter by "
                "parameter, or a plan of one stage"
            )


def _try_steps(optimizer: torch.optim.Optimizer, *, is_alone: bool) -> Tensor:
    """Return what the first parameter of a copy of `optimizer`, with small parameters, is after a few steps."""
    small: dict[int, object] = {}
    with seeded(0), torch.enable_grad():
        for group in optimizer.param_groups:
            for item in group["params"]:
                shape = [min(size, 4) for size in item.shape]
                small[id(item)] = nn.Parameter(torch.rand(shape, dtype=item.dtype, device=item.device) + 0.5)
        # Not copy.deepcopy: what torch copies of an optimizer are its groups and state, without other attributes.
        copied = object.__new__(type(optimizer))
        small[id(optimizer)] = copied
        vars(copied).update(copy.deepcopy(vars(optimizer), small))
        first = copied.param_groups[0]["params"][0]
        if is_alone:
            copied.param_groups[:] = [{**copied.param_groups[0], "params": [first]}]
        elif sum(len(group["params"]) for group in copied.param_groups) == 1:
            copied.param_groups[0]["params"].append(nn.Parameter(torch.rand_like(first) + 0.5))
    held = [item for group in copied.param_groups for item in group["params"]]
    for number in range(_TRIES):
        for position, item in enumerate(held):
            # Far larger for the others than for the first: what they share shows.
            with seeded(number * 1000 + position):
                item.grad = torch.rand_like(item) * (1.0 if item is first else 100.0) + 0.1
        with seeded(number):
            type(copied).step(copied)
    result: Tensor = first.detach()
    return result


def _step(optimizer: torch.optim.Optimizer) -> None:
    """Do `optimizer.step()`, without the profiler's range that torch puts around it if nobody would see it.

    The range takes about 0.1 ms, more than a small update itself, and PipeDream updates once per microbatch.
    """
    step = type(optimizer).step
    is_watched = (
        "step" in vars(optimizer)  # replaced, as learning rate schedulers do
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or torch._C._autograd._profiler_enabled()
    )
    if is_watched or not getattr(step, "hooked", False):
        optimizer.step()
    else:
        step.__wrapped__(optimizer)  # type: ignore[attr-defined]
