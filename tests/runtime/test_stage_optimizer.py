"""The optimizer of a stage: rates of groups, several optimizers, and those that cannot be cut."""

from __future__ import annotations

import math

import pytest
import torch
from flat_pipeline import flat_pipeline
from torch import nn
from torch.nn import functional

from vpipe.errors import ConfigError
from vpipe.model.chain import Chain
from vpipe.model.loss import CallableLoss
from vpipe.runtime.weights.stage_optimizer import StageOptimizer, refuse_coupled
from vpipe.verify.reference import Reference
from vpipe.workload.optim import OPTIMIZERS, build_optimizer

MSE = CallableLoss(functional.mse_loss)


def layers():
    torch.manual_seed(0)
    return [nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1)]


def batch():
    torch.manual_seed(1)
    return torch.randn(8, 4), torch.randn(8, 1)


def two_rates(pairs):
    slow = [item for name, item in pairs if name.endswith("bias")]
    fast = [item for name, item in pairs if not name.endswith("bias")]
    return torch.optim.SGD([{"params": fast}, {"params": slow, "lr": 0.01}], lr=0.1)


def several(pairs):
    flat = [item for _, item in pairs if item.ndim < 2]
    deep = [item for _, item in pairs if item.ndim > 1]
    made = [torch.optim.AdamW(flat, lr=0.01)]
    return (*made, torch.optim.SGD(deep, lr=0.1, momentum=0.9)) if deep else made


def test_groups_keep_the_ratio_of_their_own_rates():
    rates = []
    x, y = batch()
    with flat_pipeline(
        layers(),
        functional.mse_loss,
        optimizer=two_rates,
        num_microbatches=2,
        learning_rate=lambda done: 0.5 / (done + 1),
    ) as pipeline:
        for _ in range(2):
            pipeline.step(x, y)
            rates.append([group["lr"] for group in pipeline.held[0].weights.optimizer.param_groups])
    assert rates[0] == pytest.approx([0.5, 0.05])
    assert rates[1] == pytest.approx([0.25, 0.025])


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
@pytest.mark.parametrize("optimizer", [two_rates, several])
def test_they_equal_the_reference(optimizer, schedule):
    x, y = batch()
    chain, rate = Chain.from_modules(layers(), MSE), lambda done: 0.2 / (done + 1)
    with flat_pipeline(
        chain, optimizer=optimizer, num_microbatches=4, learning_rate=rate, schedule=schedule
    ) as pipeline:
        list(pipeline.train([(x, y)] * 3))
        state, program = pipeline.state_dict(), pipeline.programs.training(3, 0)
    reference = Reference(chain, optimizer, learning_rate=rate)
    parts = [{"input": a, "target": b} for a, b in zip(x.split(2), y.split(2), strict=True)]
    if schedule == "1f1b":
        for _ in range(3):
            reference.train_batch(parts)
    else:
        reference.train_asynchronous(parts * 3, [program.weights[0]], 4)
    for name, tensor in reference.parameters().items():
        assert torch.equal(state[name], tensor)


def test_several_optimizers_are_those_of_plain_torch():
    x, y = batch()
    net = nn.Sequential(*layers())
    with flat_pipeline(net, functional.mse_loss, optimizer=several, num_microbatches=2) as pipeline:
        for _ in range(3):
            pipeline.step(x, y)
        state = pipeline.state_dict()
    made = several(list(net.named_parameters()))
    for _ in range(3):
        net.zero_grad()
        functional.mse_loss(net(x), y).backward()
        for item in made:
            item.step()
    torch.testing.assert_close(state, dict(net.state_dict()))


def test_sparse_and_dense_weights_have_optimizers_of_their_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 1))

    def choose(pairs):
        return [
            torch.optim.SparseAdam([item for name, item in pairs if name.startswith("0.")], lr=0.1),
            torch.optim.Adam([item for name, item in pairs if not name.startswith("0.")], lr=0.1),
        ]

    ids, y = torch.tensor([1, 1, 3, 8]), torch.randn(4, 1)
    with flat_pipeline(net, functional.mse_loss, optimizer=choose, num_microbatches=2) as pipeline:
        pipeline.step(ids, y)
        state = pipeline.state_dict()
    made = choose(list(net.named_parameters()))
    functional.mse_loss(net(ids), y).backward()
    for item in made:
        item.step()
    torch.testing.assert_close(state, dict(net.state_dict()))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda pairs: [torch.optim.SGD(pairs, lr=0.1), 3], "returned list, not a torch.optim.Optimizer"),
        (lambda pairs: [], "returned list, not a torch.optim.Optimizer"),
        (lambda pairs: [torch.optim.SGD(pairs, lr=0.1)] * 2, "'a.weight' is in two of the optimizers"),
        (lambda pairs: torch.optim.SGD([], lr=0.1), r"has no such parameters \(it has a.weight, a.bias\); leave"),
        (lambda pairs: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), "not of its stage"),
        (lambda pairs: torch.optim.LBFGS([item for _, item in pairs]), "LBFGS runs the model several times"),
    ],
)
def test_what_is_no_optimizer_is_told(make, text):
    layer = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=text):
        StageOptimizer(make, [("a.weight", layer.weight), ("a.bias", layer.bias)])


class OneStep(torch.optim.SGD):
    """Has one step size for all parameters, kept in an attribute of its own."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.most = 1.0

    def step(self, closure=None):
        gradients = [item.grad for group in self.param_groups for item in group["params"]]
        norm = math.sqrt(sum(item.square().sum().item() for item in gradients))
        for group in self.param_groups:
            for item in group["params"]:
                item.data.sub_(item.grad, alpha=group["lr"] * min(1.0, self.most / norm))


def test_one_step_size_for_all_parameters_is_refused_where_stages_have_their_own():
    def coupled(pairs):
        return OneStep([item for _, item in pairs], lr=0.1)

    x, y = batch()
    options = {"optimizer": coupled, "num_microbatches": 4}
    with flat_pipeline(layers(), functional.mse_loss, **options) as pipeline:
        assert pipeline.step(x, y).loss > 0
    with pytest.raises(ConfigError, match="OneStep changes a parameter by the gradients of others"):
        flat_pipeline(layers(), functional.mse_loss, schedule="naive", stages_per_rank=2, **options)


class Settings:
    learning_rate, weight_decay, momentum, betas, eps = 0.1, 0.01, 0.9, (0.9, 0.99), 1e-8

    def __init__(self, name):
        self.name = name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_those_of_the_configuration_are_not_coupled(name):
    net = nn.Sequential(*layers(), nn.Embedding(50, 4))
    refuse_coupled([build_optimizer(Settings(name), list(net.named_parameters()))])


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True, amsgrad=True),
        lambda parameters: torch.optim.Adagrad(parameters),
        lambda parameters: torch.optim.RMSprop(parameters),
        lambda parameters: torch.optim.NAdam(parameters),
        lambda parameters: torch.optim.Adafactor(parameters),
        lambda parameters: torch.optim.Rprop(parameters),
    ],
)
def test_those_of_torch_are_not_coupled_and_left_as_they_were(make):
    torch.manual_seed(0)
    net = nn.Sequential(*layers())
    optimizer = make(net.parameters())
    before = [item.clone() for item in net.parameters()]
    kept = str(optimizer.state_dict())
    refuse_coupled([optimizer])
    assert str(optimizer.state_dict()) == kept
    assert all(torch.equal(item, old) for item, old in zip(net.parameters(), before, strict=True))


def test_a_tied_weight_that_no_batch_used_stays():
    class Skips(nn.Linear):
        def forward(self, x):
            return x * 1.0

    torch.manual_seed(0)
    one, two = Skips(4, 4, bias=False), Skips(4, 4, bias=False)
    two.weight = one.weight
    x, y = batch()
    for schedule, stages in (("1f1b", 1), ("naive", 2)):
        with flat_pipeline(
            [one, two, nn.Linear(4, 1)],
            functional.mse_loss,
            optimizer=lambda pairs: torch.optim.AdamW(pairs, lr=0.1, weight_decay=0.5),
            num_microbatches=2, schedule=schedule, stages_per_rank=stages,
        ) as pipeline:  # fmt: skip
            pipeline.step(x, y)
            assert torch.equal(pipeline.state_dict()["0.weight"], one.weight)
            assert torch.equal(pipeline.state_dict()["1.weight"], one.weight)


def test_coupling_is_found_where_a_stage_has_one_parameter():
    net = [nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False)]
    with pytest.raises(ConfigError, match="OneStep changes a parameter by the gradients of others"):
        flat_pipeline(
            net, functional.mse_loss, optimizer=lambda pairs: OneStep([item for _, item in pairs], lr=0.1),
            schedule="naive", stages_per_rank=2,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda pairs: torch.optim.SGD([{"params": [item for _, item in pairs], "lr": 0.1}]), [0.1]),
        (
            lambda pairs: torch.optim.AdamW(
                [{"params": [item], "lr": 0.01 if name.startswith("1.") else 0.02} for name, item in pairs]
            ),
            [0.1, 0.1, 0.05, 0.05, 0.1, 0.1],
        ),
        (
            lambda pairs: [
                torch.optim.SGD([item for _, item in pairs[:2]], lr=0.02),
                torch.optim.SGD([item for _, item in pairs[2:]], lr=0.002),
            ],
            [0.1, 0.01],
        ),
        (lambda pairs: torch.optim.SGD(pairs, lr=0.0), [0.1]),
    ],
)
def test_rates_of_groups_are_taken_by_the_one_that_is_usual(make, expected):
    x, y = batch()
    with flat_pipeline(
        layers(), functional.mse_loss, optimizer=make, num_microbatches=2, learning_rate=lambda done: 0.1
    ) as pipeline:
        pipeline.step(x, y)
        groups = pipeline.held[0].weights.optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx(expected)


def test_a_stage_of_unusual_groups_alone_keeps_the_ratio():
    x, y = batch()
    with flat_pipeline(
        [nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1)], functional.mse_loss, num_microbatches=2,
        optimizer=lambda pairs: torch.optim.SGD(
            [{"params": [item], **({"lr": 0.01} if name.startswith("0.") else {})} for name, item in pairs], lr=0.1
        ),
        learning_rate=lambda done: 1.0, schedule="naive", stages_per_rank=3,
    ) as pipeline:  # fmt: skip
        pipeline.step(x, y)
        rates = [group["lr"] for item in pipeline.held.values() for group in item.weights.optimizer.param_groups]
    assert rates == pytest.approx([0.1, 0.1, 1.0, 1.0, 1.0, 1.0])
