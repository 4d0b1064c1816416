"""What the library's user may write, turned into what the runtime works with; mistakes are told in the user's words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import get_args

import torch
from torch import Tensor

from vpipe.errors import ConfigError, PlanError
from vpipe.model.chain import Chain
from vpipe.model.loss import CallableLoss
from vpipe.model.modules import Modules
from vpipe.plan.policy import Policy, check_ratios, trailing_policies
from vpipe.runtime.assembly import RecomputeMode
from vpipe.runtime.comm.process_group import use_device

__all__ = [
    "as_chain",
    "as_device",
    "check_training_arguments",
    "count_batches",
    "limit_of",
    "policy_per_block",
    "ratio_per_stage",
    "schedule_options",
]


def as_chain(model: Chain | Modules, loss: Callable[..., Tensor] | None) -> Chain:
    """Return `model` as a chain that ends in `loss`.

    Raises:
        ConfigError: a chain with a loss beside it, or modules without one.
        ModelError: `model` is neither a chain nor modules in a row.
    """
    if isinstance(model, Chain):
        if loss is not None:
            raise ConfigError("a Chain brings its own loss; leave the loss argument out")
        return model
    if isinstance(loss, type):
        raise ConfigError(f"the loss is the class {loss.__name__}, not a function; make one: {loss.__name__}()")
    if not callable(loss):
        got = "none was given" if loss is None else f"got {type(loss).__name__}"
        raise ConfigError(
            f"modules need a loss, and {got}; give a function of the last module's output and the batch's target that "
            "returns the mean over samples, e.g. torch.nn.functional.mse_loss"
        )
    return Chain.from_modules(model, loss if isinstance(loss, CallableLoss) else CallableLoss(loss))


def as_device(device: torch.device | str) -> torch.device:
    """Return the device that is meant, and make it the one that torch takes when none is named.

    Raises:
        ConfigError: torch knows no such device, or it is not there.
    """
    try:
        return use_device(torch.device(device))
    except RuntimeError as error:
        raise ConfigError(f"device is '{device}', which torch does not know; use cpu, cuda or cuda:<index>") from error


def check_training_arguments(
    optimizer: object, recompute: str, clip_grad_norm: float | None, learning_rate: object
) -> None:
    """Raise ConfigError for arguments that would only be found out about in the middle of a training step."""
    if not callable(optimizer):
        raise ConfigError(
            f"optimizer is of type {type(optimizer).__name__}; give a function that makes one of a stage's parameters, "
            "e.g. lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
        )
    if learning_rate is not None and not callable(learning_rate):
        raise ConfigError(
            f"learning_rate is {learning_rate!r}; give a function of the iterations done, or set a constant rate in "
            "the optimizer"
        )
    if recompute not in get_args(RecomputeMode):
        raise ConfigError(f"recompute is '{recompute}'; choose one of {', '.join(get_args(RecomputeMode))}")
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise ConfigError(f"clip_grad_norm is {clip_grad_norm}; give a number above 0, or None for no clipping")


def ratio_per_stage(ratio: float | Sequence[float], num_stages: int) -> list[float]:
    """Return one recompute ratio per stage.

    Raises:
        PlanError: another number of ratios than stages, or one outside 0 to 1.
    """
    ratios = [float(item) for item in ratio] if isinstance(ratio, Sequence) else [float(ratio)] * num_stages
    if reasons := check_ratios(ratios, num_stages):
        raise PlanError(f"recompute_ratio {ratios} " + "; it ".join(reasons))
    return ratios


def policy_per_block(
    policies: Sequence[Policy | str] | None, ratio: float | Sequence[float], partition: Sequence[int]
) -> tuple[Policy, ...]:
    """Return what every block does with its activations: as `policies` says, or else as the recompute ratio does.

    Raises:
        PlanError: both are given, or not one known policy per block.
    """
    ratios = ratio_per_stage(ratio, len(partition))
    if policies is None:
        return trailing_policies(partition, ratios)
    if any(ratios):
        raise PlanError(f"recompute_ratio {ratios} and policies say the same thing twice; keep one")
    known, count = [policy.value for policy in Policy], sum(partition)
    if isinstance(policies, str) or len(policies) != count:
        raise PlanError(f"policies {list(policies)} has {len(policies)} entries for {count} blocks; give one per block")
    for block, policy in enumerate(policies):
        if policy not in known:
            raise PlanError(f"policies has {policy!r} for block {block}; use one of {', '.join(known)}")
    return tuple(map(Policy, policies))


def schedule_options(
    depths: Sequence[int] | None,
    vertical_sync: bool,
    memory_limit: float | Sequence[float] | None,
    rank_times: Mapping[str, Sequence[float]] | None,
) -> dict[str, object]:
    """Return the options of the schedule's builder that were given: a family refuses those that it does not have."""
    given = {"depths": depths, "vertical_sync": vertical_sync or None, "memory_limit": memory_limit}
    return {**{name: value for name, value in given.items() if value is not None}, **(rank_times or {})}


def limit_of(limit: int | Sequence[int] | None, rank: int, num_ranks: int) -> int | None:
    """Return the bytes that `rank` may hold, of one limit for all or one for each.

    Raises:
        ConfigError: another number of limits than ranks, or one that is no size.
    """
    limits = list(limit) if isinstance(limit, Sequence) else [limit]
    if len(limits) == 1:
        limits *= num_ranks
    if len(limits) != num_ranks:
        raise ConfigError(f"memory_limit_bytes has {len(limits)} entries for {num_ranks} ranks; give one, or one each")
    if any(item is not None and item < 1 for item in limits):
        raise ConfigError(f"memory_limit_bytes is {limit}; give bytes above 0, or None for no limit")
    return limits[rank]


def count_batches(batches: Iterable[object], num_batches: int | None, *, synchronous: bool) -> int | None:
    """Return how many batches to train on; None, for a synchronous schedule alone: all there are.

    Raises:
        ConfigError: an asynchronous schedule needs to know, and `batches` has no length.
    """
    if num_batches is not None:
        if num_batches < 0:
            raise ConfigError(f"num_batches is {num_batches}; it must be at least 0")
        return num_batches
    if synchronous:
        return None
    if isinstance(batches, Sized):
        try:
            return len(batches)
        except TypeError:
            pass  # a DataLoader of an iterable dataset has a len() that only complains
    raise ConfigError(
        f"an asynchronous schedule must know when to drain, and a {type(batches).__name__} does not say how many "
        "batches it has; pass num_batches"
    )
