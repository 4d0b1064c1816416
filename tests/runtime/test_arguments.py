"""What users may write is understood, and what they may not is told in their words."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from vpipe.errors import ConfigError, ExecutionError, ModelError
from vpipe.model.chain import Chain
from vpipe.model.loss import CallableLoss
from vpipe.plan.plan import Plan
from vpipe.runtime.arguments import (
    Memory,
    Update,
    as_chain,
    as_plan,
    check_optimizer,
    count_batches,
)
from vpipe.runtime.comm.world import World
from vpipe.runtime.pipeline import Pipeline

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


def test_an_optimizer_is_made_by_a_function():
    check_optimizer(torch.optim.SGD)
    with pytest.raises(ConfigError, match="optimizer is of type SGD; give a function"):
        check_optimizer(torch.optim.SGD([torch.ones(1, requires_grad=True)]))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"clip_grad_norm": 0.0}, "clip_grad_norm is 0.0; give a number above 0, or None"),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm is -1.0"),
        ({"clip_grad_norm": float("nan")}, "clip_grad_norm is nan"),
        ({"learning_rate": 0.1}, "learning_rate is 0.1; give a function of the iterations done"),
    ],
)
def test_what_an_update_does_is_checked(arguments, text):
    with pytest.raises(ConfigError, match=text):
        Update(**arguments)
    Update(1.0, lambda done: 0.1)


def test_a_plan_is_a_plan_or_the_name_of_a_schedule():
    assert as_plan("gpipe") == Plan("gpipe")
    assert as_plan(Plan("gpipe", num_microbatches=4)) == Plan("gpipe", num_microbatches=4)
    with pytest.raises(ConfigError, match=r"plan is of type list; give a vpipe\.Plan, or the name of a schedule"):
        as_plan([1, 2])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("schedule", "plan=vpipe.Plan('1f1b', ...)"),
        ("num_microbatches", "plan=vpipe.Plan('1f1b', num_microbatches=...)"),
        ("recompute_ratio", "plan=vpipe.Plan('1f1b', recompute_ratio=...)"),
        ("memory_limit", "plan=vpipe.Plan('searched', max_in_flight=...)"),
        ("memory_limit_bytes", "memory=vpipe.Memory(limit=...)"),
        ("clip_grad_norm", "update=vpipe.Update(clip_grad_norm=...)"),
        ("device", "world=vpipe.World.join(device=...)"),
        ("field_specs", "model=chain.with_field_specs(...)"),
    ],
)
def test_an_old_argument_names_its_new_place(name, place):
    with pytest.raises(ConfigError, match=re.escape(f"Pipeline has no argument '{name}' any more; say it as {place}")):
        Pipeline(MODULES, LOSS, optimizer=torch.optim.SGD, **{name: None})


def test_an_unknown_argument_is_told_with_what_is_near():
    with pytest.raises(ConfigError, match="no argument 'optimiser'; did you mean 'optimizer'"):
        Pipeline(MODULES, LOSS, optimiser=torch.optim.SGD)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"memory": 3}, "memory is 3; give a vpipe.Memory"),
        ({"update": 0.1}, "update is 0.1; give a vpipe.Update"),
        ({"world": "cpu"}, "world is 'cpu'; give a vpipe.World"),
        ({"hooks": 3}, "hooks is 3; give a vpipe.Hooks"),
        ({"seed": "x"}, "seed is 'x'; give a whole number"),
    ],
)
def test_arguments_of_another_kind_are_told(arguments, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        Pipeline(MODULES, LOSS, optimizer=torch.optim.SGD, **arguments)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"limit": "4GiB"}, "the memory limit is '4GiB'; give a number of bytes"),
        ({"watch": "never"}, "watch is 'never'; choose one of first, all"),
        ({"swap_directory": 3}, "swap_directory is 3; give a path"),
    ],
)
def test_what_a_rank_may_hold_is_checked(arguments, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        Memory(**arguments)


def test_the_front_door_has_few_arguments():
    assert len(inspect.signature(Pipeline.__init__).parameters) - 1 <= 10


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
    assert [Memory(limit).limit_of(1, 2) for limit in (None, 7, [7], [5, 6])] == [None, 7, 7, 6]


@pytest.mark.parametrize(
    ("limit", "message"),
    [([5, 6, 7], "the memory limit has 3 entries for 2 ranks"), ([5, 0], r"the memory limit is \[5, 0\]")],
)
def test_limits_that_fit_no_rank_are_refused(limit: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Memory(limit).limit_of(0, 2)


class Trainer(Pipeline):
    """A pipeline with an argument of its own."""

    def __init__(self, model, loss, *, patience, **options):
        super().__init__(model, loss, **options)
        self.patience = patience


def test_a_class_of_the_users_own_may_have_other_arguments():
    with Trainer(MODULES, LOSS, patience=3, optimizer=torch.optim.SGD) as trainer:
        assert trainer.patience == 3
        assert trainer.step(torch.ones(2, 2), torch.ones(2, 2)).loss > 0
    with pytest.raises(ConfigError, match="no argument 'schedule' any more"):
        Trainer(MODULES, LOSS, patience=3, optimizer=torch.optim.SGD, schedule="gpipe")
    assert list(inspect.signature(Pipeline).parameters)[:3] == ["model", "loss", "plan"]


def test_a_pipeline_that_was_closed_says_so():
    batch = torch.ones(2, 2), torch.ones(2, 2)
    with Pipeline(MODULES, LOSS, optimizer=torch.optim.SGD) as pipeline:
        pipeline.step(*batch)
    assert set(pipeline.state_dict()) == {"0.weight", "0.bias"}
    with World.join() as world:
        left = Pipeline(MODULES, LOSS, optimizer=torch.optim.SGD, world=world)
    for closed in (pipeline, left):
        with pytest.raises(ExecutionError, match="the pipeline was closed, so its ranks cannot be reached any more"):
            closed.step(*batch)
        with pytest.raises(ExecutionError, match="the pipeline was closed"):
            closed.evaluate([batch])
