"""What users may write is understood, and what they may not is told in their words."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from vpipe.errors import ConfigError, ModelError, PlanError
from vpipe.model.chain import Chain
from vpipe.model.loss import CallableLoss
from vpipe.runtime.arguments import (
    as_chain,
    as_device,
    check_training_arguments,
    count_batches,
    limit_of,
    ratio_per_stage,
)

MODULES = [nn.Linear(2, 2), nn.Tanh()]
LOSS = nn.functional.mse_loss


@pytest.mark.parametrize("modules", [MODULES, tuple(MODULES), nn.Sequential(*MODULES), nn.ModuleList(MODULES)])
@pytest.mark.parametrize("loss", [LOSS, nn.MSELoss(), CallableLoss(LOSS)])
def test_modules_and_a_loss_make_a_chain(modules, loss):
    chain = as_chain(modules, loss)
    assert len(chain) == 2
    assert chain.fields == ("input", "target")
    assert chain.loss.parts == ("loss",)


def test_a_chain_brings_its_own_loss():
    chain = Chain.from_modules(MODULES, CallableLoss(LOSS))
    assert as_chain(chain, None) is chain
    with pytest.raises(ConfigError, match="a Chain brings its own loss; leave the loss argument out"):
        as_chain(chain, LOSS)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (None, "and none was given"),
        ("mse", "and got str; give a function"),
        (nn.MSELoss, r"the loss is the class MSELoss, not a function; make one: MSELoss\(\)"),
    ],
)
def test_modules_need_a_loss(loss, text):
    with pytest.raises(ConfigError, match=text):
        as_chain(MODULES, loss)


def test_other_things_are_no_model():
    with pytest.raises(ModelError, match="not of Linear"):
        as_chain(nn.Linear(2, 2), LOSS)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            (torch.optim.SGD([torch.ones(1, requires_grad=True)]), "always", None, None),
            "optimizer is of type SGD; give a",
        ),
        (
            (torch.optim.SGD, "sometimes", None, None),
            "recompute is 'sometimes'; choose one of always, except_last, never",
        ),
        ((torch.optim.SGD, "never", 0.0, None), "clip_grad_norm is 0.0; give a number above 0, or None"),
        ((torch.optim.SGD, "never", -1.0, None), "clip_grad_norm is -1.0"),
        ((torch.optim.SGD, "never", float("nan"), None), "clip_grad_norm is nan"),
        ((torch.optim.SGD, "never", None, 0.1), "learning_rate is 0.1; give a function of the iterations done"),
    ],
)
def test_training_arguments_are_checked(arguments, text):
    with pytest.raises(ConfigError, match=text):
        check_training_arguments(*arguments)
    check_training_arguments(torch.optim.SGD, "except_last", 1.0, lambda done: 0.1)


def test_a_device_is_one_that_torch_knows():
    assert as_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="device is 'gpu', which torch does not know; use cpu, cuda or"):
        as_device("gpu")


def test_ratios_are_for_all_stages_or_one_for_each():
    assert ratio_per_stage(0.5, 3) == [0.5] * 3
    assert ratio_per_stage([0, 1], 2) == [0.0, 1.0]
    with pytest.raises(PlanError, match=r"recompute_ratio \[0.0, 1.0\] has 2 entries for 3 stages"):
        ratio_per_stage([0, 1], 3)
    with pytest.raises(PlanError, match=r"gives stage 1 the ratio 1.5; a ratio is from 0 to 1"):
        ratio_per_stage([0, 1.5], 2)


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


def test_batches_are_counted_where_that_is_needed():
    assert count_batches([1, 2], None, synchronous=False) == 2
    assert count_batches(iter([1, 2]), 7, synchronous=False) == 7
    assert count_batches(iter([1, 2]), None, synchronous=True) is None
    assert count_batches([1, 2], None, synchronous=True) is None


@pytest.mark.parametrize(
    ("batches", "text"), [(iter([1]), "a list_iterator does not"), (DataLoader(Endless()), "a DataLoader does not say")]
)
def test_an_asynchronous_schedule_needs_to_know(batches, text):
    with pytest.raises(ConfigError, match=f"must know when to drain, and {text}.*pass num_batches"):
        count_batches(batches, None, synchronous=False)


def test_fewer_than_no_batches_are_refused():
    with pytest.raises(ConfigError, match="num_batches is -1; it must be at least 0"):
        count_batches([], -1, synchronous=True)


def test_one_limit_is_for_all_ranks_and_several_are_one_each() -> None:
    assert [limit_of(limit, 1, 2) for limit in (None, 7, [7], [5, 6])] == [None, 7, 7, 6]


@pytest.mark.parametrize(
    ("limit", "message"),
    [([5, 6, 7], "memory_limit_bytes has 3 entries for 2 ranks"), ([5, 0], r"memory_limit_bytes is \[5, 0\]")],
)
def test_limits_that_fit_no_rank_are_refused(limit: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        limit_of(limit, 0, 2)
