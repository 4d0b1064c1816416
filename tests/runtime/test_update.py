"""Updates in one process: what happens in which order, and to which stages together."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vpipe.runtime.comm.waits.activity import Activity
from vpipe.runtime.hooks import Hooks
from vpipe.runtime.weights.update import TiedCopy, TiedGroup, Update, Updater
from vpipe.runtime.weights.weights import WeightVersions


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


class One(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([start]))


def build(starts=(1.0, 2.0), tied=(), *, synchronous=True, clip=None, rate=None, hooks=None, loss=1.0, **options):
    weights = {stage: WeightVersions([One(start)], [f"{stage}.weight"], sgd) for stage, start in enumerate(starts)}
    for item in weights.values():
        item.start([0])
        item._uses.clear()
    names = [name for item in weights.values() for name in item.names]
    updater = Updater(
        weights,
        names,
        tied,
        Update(clip, rate, **options),
        synchronous=synchronous,
        loss_of_batch=lambda: loss,
        world=SimpleNamespace(peers=None, activity=Activity(), gather=lambda mine, what: [mine]),
        hooks=hooks or Hooks(),
    )
    return weights, updater


def give(weights, *gradients):
    for item, gradient in zip(weights.values(), gradients, strict=True):
        item.parameters[0].grad = None if gradient is None else torch.tensor([gradient])


def values(weights):
    return [item.newest[0].weight.item() for item in weights.values()]


def ties(*stages):
    return [TiedGroup(tuple(TiedCopy(stage, 0, f"{stage}.weight") for stage in stages), None)]


def test_synchronous_stages_of_a_rank_update_together_at_the_last_step():
    seen = []
    hooks = Hooks(gradients=lambda stage, microbatch, named: seen.append((stage, microbatch, *named)))
    weights, updater = build(hooks=hooks)
    give(weights, 0.5, 0.25)
    updater.step(1, 7, 0.0)
    assert values(weights) == [1.0, 2.0]
    assert seen == []
    updater.step(0, 7, 0.0)
    assert values(weights) == [0.5, 1.75]
    assert seen == [(1, 7, "1.weight"), (0, 7, "0.weight")]


def test_asynchronous_stages_update_by_themselves():
    weights, updater = build(synchronous=False)
    give(weights, 0.5, 0.25)
    updater.step(1, 7, 0.0)
    assert values(weights) == [1.0, 1.75]


def test_synchronous_clipping_is_by_the_norm_over_all_stages():
    weights, updater = build(clip=1.0)
    give(weights, 3.0, 4.0)
    updater.step(0, 0, 0.0)
    updater.step(1, 0, 0.0)
    assert updater.gradient_norm == 5.0
    assert values(weights) == pytest.approx([1 - 0.6, 2 - 0.8], rel=1e-5)


def test_asynchronous_clipping_is_by_each_stages_own_norm():
    weights, updater = build(clip=1.0, synchronous=False)
    give(weights, 0.5, 4.0)
    updater.step(0, 0, 0.0)
    assert updater.gradient_norm == 0.5
    updater.step(1, 0, 0.0)
    assert updater.gradient_norm == 4.0
    assert values(weights) == pytest.approx([0.5, 1.0], rel=1e-5)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_copies_of_a_weight_get_the_sum_and_count_once(clip):
    weights, updater = build((1.0, 5.0, 9.0), ties(0, 2), clip=clip)
    assert values(weights) == [1.0, 5.0, 1.0]
    give(weights, 1.0, 4.0, 2.0)
    for stage in range(3):
        updater.step(stage, 0, 0.0)
    factor = 1 if clip is None else 1 / math.hypot(3.0, 4.0)
    assert values(weights) == pytest.approx([1 - 3 * factor, 5 - 4 * factor, 1 - 3 * factor], rel=1e-5)


def test_copies_without_a_gradient_get_that_of_the_others():
    weights, updater = build(tied=ties(0, 1))
    give(weights, None, 0.25)
    updater.step(0, 0, 0.0)
    updater.step(1, 0, 0.0)
    assert values(weights) == [0.75, 0.75]


def test_a_weight_without_gradient_stays():
    weights, updater = build(clip=1.0)
    give(weights, None, 0.25)
    updater.step(0, 0, 0.0)
    updater.step(1, 0, 0.0)
    assert values(weights) == [1.0, 1.75]


def test_the_learning_rate_is_set_before_the_step():
    weights, updater = build(rate=lambda iterations: iterations / 10, synchronous=False)
    give(weights, 1.0, 1.0)
    updater.step(0, 0, 2.5)
    assert values(weights) == [0.75, 2.0]


def test_what_an_update_waits_for_is_announced_and_measured():
    told, waited = [], []
    weights, updater = build(clip=1.0, hooks=Hooks(announce=told.append, waited=waited.append))
    give(weights, 1.0, 1.0)
    updater.step(0, 0, 0.0)
    assert told == []
    updater.step(1, 0, 0.0)
    assert told == ["waiting for the gradient norm from other ranks", "running"]
    assert len(waited) == 1


def test_what_is_not_finite_is_not_applied():
    weights, updater = build(loss=math.nan)
    give(weights, 1.0, 1.0)
    for stage in (0, 1):
        updater.step(stage, 0, 0.0)
    assert values(weights) == [1.0, 2.0]
    assert [item.parameters[0].grad for item in weights.values()] == [None, None]
    assert updater.take_refused(range(1)) == ["the loss became nan"] * 2
    assert updater.take_refused(range(1)) == []


def test_stages_that_update_by_themselves_look_at_their_own_gradients():
    weights, updater = build(synchronous=False, loss=math.nan)
    give(weights, math.inf, 1.0)
    for stage in (0, 1):
        updater.step(stage, 3, 0.0)
    assert values(weights) == [1.0, 1.0]
    assert updater.take_refused(range(2, 4)) == ["a gradient became NaN or infinite"]


@pytest.mark.parametrize(("options", "reason"), [({"on_non_finite": "skip"}, "a gradient"), ({"clip": 1.0}, "norm")])
def test_one_stage_keeps_all_of_a_synchronous_batch_back(options, reason):
    weights, updater = build(**options)
    give(weights, 1.0, math.nan)
    for stage in (0, 1):
        updater.step(stage, 0, 0.0)
    assert values(weights) == [1.0, 2.0]
    assert reason in updater.take_refused(range(1))[0]


def test_a_gradient_that_nobody_looks_at_is_applied():
    weights, updater = build()
    give(weights, 1.0, math.inf)
    for stage in (0, 1):
        updater.step(stage, 0, 0.0)
    assert values(weights) == [0.0, -math.inf]
