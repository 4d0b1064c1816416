"""Weight versions: the closed forms of delayed updates, and what they cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vpipe.errors import ConfigError, ScheduleError
from vpipe.runtime.weights.weights import WeightVersions
from vpipe.schedule.action import Kind
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.weights import weight_usage

RATE = 0.1


class Scale(nn.Module):
    """Multiplies by one weight, counts its forwards in a buffer, and has a frozen weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
        self.fixed = nn.Parameter(torch.ones(5), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, value):
        self.calls.add_(1)
        return value * self.weight


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=RATE)


def gradient(weight):
    """Of the loss ``weight ** 3``."""
    return 3 * weight**2


def replay(weights, order, usage):
    """Do what one stage's order says; return the weight after each update."""
    weights.start(usage.version_of)
    graphs, path = {}, []
    for action in order:
        serial = action.microbatch
        if action.kind is Kind.F:
            module = weights.modules(usage.version_of[serial])[0]
            graphs[serial] = module(module.weight * module.weight).sum()
        elif action.kind is Kind.B:
            weights.accumulate(usage.version_of[serial], lambda k=serial: graphs.pop(k).backward() or {})
        else:
            weights.step()
            path.append(weights.newest[0].weight.item())
    return path


def closed_form(num_updates, delay, group=1):
    """Return w(t + 1) = w(t) - rate * group * g(w(t - delay)), where early updates have only the first weight."""
    path = [2.0]
    for update in range(num_updates):
        stale = path[max(0, update - delay)]
        path.append(path[update] - RATE * group * gradient(stale) * 0.01)
    return path[1:]


def slow(parameters):
    return torch.optim.SGD(parameters, lr=RATE * 0.01)


@pytest.mark.parametrize("stage", range(4))
def test_pipedream_is_stale_by_the_stages_that_follow(stage):
    schedule = build_schedule("pipedream", 4, 12)
    weights = WeightVersions([Scale()], ["w"], slow)
    path = replay(weights, schedule.stage_order(stage), weight_usage(schedule)[stage])
    assert path == pytest.approx(closed_form(12, 3 - stage), rel=1e-12)
    assert weights.num_sets == 4 - stage


@pytest.mark.parametrize("stage", range(4))
def test_vertical_sync_is_equally_stale_everywhere(stage):
    schedule = build_schedule("pipedream", 4, 12, vertical_sync=True)
    weights = WeightVersions([Scale()], ["w"], slow)
    path = replay(weights, schedule.stage_order(stage), weight_usage(schedule)[stage])
    assert path == pytest.approx(closed_form(12, 3), rel=1e-12)
    assert weights.num_sets == 4


@pytest.mark.parametrize("stage", range(3))
def test_macrobatches_are_stale_by_one_in_two_versions(stage):
    schedule = build_schedule("pipedream", 3, 20, microbatches_per_update=4)
    weights = WeightVersions([Scale()], ["w"], slow)
    path = replay(weights, schedule.stage_order(stage), weight_usage(schedule)[stage])
    assert path == pytest.approx(closed_form(5, 1, group=4), rel=1e-12)
    assert weights.num_sets == 2


@pytest.mark.parametrize("name", ["naive", "gpipe", "1f1b"])
def test_synchronous_updates_are_in_place(name):
    schedule = build_schedule(name, 3, 5)
    weights = WeightVersions([Scale()], ["w"], slow)
    place = weights.newest[0].weight.data_ptr()
    for _ in range(3):
        replay(weights, schedule.stage_order(1), weight_usage(schedule)[1])
    assert weights.num_sets == 1
    assert weights.newest[0].weight.data_ptr() == weights.parameters[0].data_ptr() == place


def test_a_program_goes_on_from_the_newest_weights_in_the_sets_that_are_there():
    schedule = build_schedule("pipedream", 4, 6)
    weights = WeightVersions([Scale()], ["w"], slow)
    first = replay(weights, schedule.stage_order(1), weight_usage(schedule)[1])
    second = replay(weights, schedule.stage_order(1), weight_usage(schedule)[1])
    assert second[0] == pytest.approx(first[-1] - RATE * 0.01 * gradient(first[-1]), rel=1e-12)
    assert weights.num_sets == 3


def test_versions_cost_parameters_and_nothing_else():
    schedule = build_schedule("pipedream", 4, 12)
    weights = WeightVersions([nn.Linear(50, 50)], ["w", "b"], torch.optim.Adam)
    usage = weight_usage(schedule)[0]
    weights.start(usage.version_of)
    graphs, seen = {}, set()
    for action in schedule.stage_order(0):
        serial = action.microbatch
        if action.kind is Kind.F:
            graphs[serial] = weights.modules(usage.version_of[serial])[0](torch.ones(1, 50)).sum()
        elif action.kind is Kind.B:
            weights.accumulate(usage.version_of[serial], lambda k=serial: graphs.pop(k).backward() or {})
        else:
            weights.step()
        seen.add(weights.newest[0].weight.data_ptr())
        assert weights.parameters[0].data_ptr() == weights.newest[0].weight.data_ptr()
    assert len(seen) == weights.num_sets == usage.num_versions == 4
    assert [weights.optimizer.state[item]["exp_avg"].shape for item in weights.parameters] == [(50, 50), (50,)]
    assert len(weights.optimizer.state) == 2
    assert all(item.grad is None for item in [*weights.parameters, *weights.newest.parameters()])


def two_versions(factory=Scale, names=("w",)):
    """Return weights whose first version is still needed when an update makes the second."""
    weights = WeightVersions([factory()], list(names), sgd)
    weights.start([0, 0])
    old = weights.modules(0)
    weights.accumulate(0, lambda: old[0](torch.ones(1, dtype=torch.float64)).sum().backward() or {})
    weights.step()
    return weights, old, weights.newest


def test_buffers_and_frozen_parameters_are_not_versioned():
    weights, old, new = two_versions()
    assert weights.num_sets == 2
    assert new[0].weight is not old[0].weight
    assert new[0].fixed is old[0].fixed
    new[0](torch.ones(1))
    assert old[0].calls.item() == new[0].calls.item() == 2


def test_buffers_that_a_module_reassigns_are_shared_too():
    _, old, new = two_versions()
    new[0].calls = new[0].calls + 10
    assert old[0].calls.item() == 11


def test_what_a_saved_graph_needs_is_not_written():
    weights, old, _ = two_versions()
    before = old[0].weight.item()
    graph = old[0](old[0].weight).sum()
    weights.parameters[0].grad = torch.ones_like(weights.parameters[0])
    weights._uses[1] = 0  # nobody uses the newest, so it is updated in place
    weights.step()
    graph.backward()
    assert old[0].weight.item() == before
    assert old[0].weight.grad.item() == 2 * before


@pytest.mark.parametrize(
    ("module", "shape"), [(nn.Linear(3, 3), (2, 3)), (nn.LayerNorm(3), (2, 3)), (nn.Conv1d(3, 3, 1), (2, 3, 4))]
)
def test_autograd_notices_weights_that_are_overwritten_under_a_graph(module, shape):
    """The trap of `parameter.data = ...`, which swaps memory under a graph without an error."""
    weights = WeightVersions([module], [name for name, _ in module.named_parameters()], sgd)
    weights.start([0])
    graph = weights.newest[0](torch.randn(shape, requires_grad=True)).square().sum()
    for parameter in weights.parameters:
        parameter.grad = torch.ones_like(parameter)
    weights._uses[0] = 0  # a schedule that is wrong about who needs what
    weights.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()


def test_a_version_that_is_not_held_is_named():
    weights, _, _ = two_versions()
    with pytest.raises(ScheduleError, match="weight version 2 is not held; versions held: 0, 1"):
        weights.modules(2)


def test_a_stage_without_parameters_has_versions_and_no_optimizer():
    weights = WeightVersions([nn.Tanh(), nn.Linear(2, 2).requires_grad_(False)], [], torch.optim.SGD)
    weights.start([0, 0, 1])
    assert weights.accumulate(0, lambda: {"x": torch.ones(1)}) == {"x": torch.ones(1)}
    weights.step()
    assert weights.optimizer is None
    assert weights.gradients() == []
    assert weights.newest[0](torch.zeros(1)).item() == 0


def test_parameters_without_gradient_stay_out_of_the_update():
    weights = WeightVersions([Scale()], ["w"], lambda named: torch.optim.AdamW(named, weight_decay=0.5))
    weights.start([0])
    weights.accumulate(0, dict)
    weights.step()
    assert weights.newest[0].weight.item() == 2.0


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        (lambda named: None, "returned NoneType, not a torch.optim.Optimizer; give a function of a stage's parameters"),
        (lambda named: torch.optim.SGD, "returned type, not a torch.optim.Optimizer"),
        (
            lambda named: torch.optim.SGD([torch.ones(1, requires_grad=True)]),
            "holds parameters that are not of its stage",
        ),
        (torch.optim.LBFGS, "LBFGS runs the model several times per step, which a pipeline cannot"),
    ],
)
def test_what_is_no_optimizer_of_the_stage_is_refused(factory, text):
    with pytest.raises(ConfigError, match=text):
        WeightVersions([Scale()], ["w"], factory)


def test_an_optimizer_may_leave_parameters_out():
    weights = WeightVersions([nn.Linear(2, 2)], ["w", "b"], lambda named: torch.optim.SGD([named[0]], lr=1.0))
    weights.start([0])
    bias = weights.newest[0].bias.detach().clone()
    weights.accumulate(0, lambda: weights.newest[0](torch.ones(2)).sum().backward() or {})
    weights.step()
    assert torch.equal(weights.newest[0].bias, bias)
