"""What is not finite is not applied."""

from __future__ import annotations

import math

import pytest
import torch
from flat_pipeline import flat_pipeline
from torch import nn
from torch.nn import functional

from vpipe.errors import ConfigError, NonFiniteLossError
from vpipe.verify.reference import Reference

SYNCHRONOUS = ("gpipe", "1f1b", "zb-h1")


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=0.01)


class Root(nn.Linear):
    """Has a finite value, and a gradient that is infinite where its input is 7."""

    def __init__(self):
        super().__init__(4, 4)
        self.zero = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return super().forward(x) + (self.zero.sum().sqrt() if (x == 7).any() else 0.0)


def layers(first=None):
    torch.manual_seed(0)
    return [nn.Linear(4, 4) if first is None else first, nn.Linear(4, 1)]


def batches(bad=math.nan, number=4, at=1):
    generator = torch.Generator().manual_seed(0)
    made = [(torch.randn(4, 4, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(number)]
    made[at][0][2, 1] = bad
    return made


def build(modules, **options):
    return flat_pipeline(modules, functional.mse_loss, optimizer=adam, num_microbatches=2, **options)


@pytest.mark.parametrize("schedule", SYNCHRONOUS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_stay_those_before_the_batch_and_training_can_go_on(schedule, bad):
    good, broken, *others = batches(bad)
    with build(layers(), schedule=schedule) as pipeline:
        pipeline.step(*good)
        before = pipeline.state_dict()
        with pytest.raises(NonFiniteLossError, match=r"the loss became \w+ at iteration 2 .*those before this batch\."):
            pipeline.step(*broken)
        torch.testing.assert_close(pipeline.state_dict(), before, rtol=0, atol=0)
        losses = [pipeline.step(*item).loss for item in others]
    assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("schedule", SYNCHRONOUS)
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.1}, {"measure_norm": True}])
def test_skipping_is_a_reference_that_skips(schedule, options):
    data = batches()
    with build(layers(), schedule=schedule, on_non_finite="skip", **options) as pipeline:
        results = list(pipeline.train(data))
        state, chain = pipeline.state_dict(), pipeline.chain
    assert [item.num_skipped for item in results] == [0, 1, 0, 0]
    assert math.isnan(results[1].loss)
    reference = Reference(chain, adam, clip_grad_norm=options.get("clip_grad_norm"))
    for x, y in data:
        reference.train_batch([{"input": a, "target": b} for a, b in zip(x.split(2), y.split(2), strict=True)])
    for name, tensor in reference.parameters().items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("options", [{"on_non_finite": "skip"}, {"on_non_finite": "skip", "clip_grad_norm": 1.0}])
def test_a_gradient_that_is_not_finite_under_a_loss_that_is(options):
    data = batches(7.0)
    with build(layers(Root()), **options) as pipeline:
        results = list(pipeline.train(data))
        assert all(item.isfinite().all() for item in pipeline.state_dict().values())
    assert [item.num_skipped for item in results] == [0, 1, 0, 0]
    assert all(math.isfinite(item.loss) for item in results)


@pytest.mark.parametrize("option", [{"clip_grad_norm": 1.0}, {"measure_norm": True}])
def test_a_norm_that_is_not_finite_is_told(option):
    good, broken, *_ = batches(7.0)
    with build(layers(Root()), **option) as pipeline:
        assert pipeline.step(*good).gradient_norm > 0
        before = pipeline.state_dict()
        text = r"the gradient norm became (nan|inf) at iteration 2 \(loss [\d.]+\)"
        with pytest.raises(NonFiniteLossError, match=text):
            pipeline.step(*broken)
        torch.testing.assert_close(pipeline.state_dict(), before, rtol=0, atol=0)


def test_the_norm_is_told_without_clipping():
    data = batches(0.0)
    with (
        build(layers(), measure_norm=True) as one,
        build(layers(), clip_grad_norm=1e9) as two,
        build(layers()) as three,
    ):
        norms = [[item.gradient_norm for item in pipeline.train(data)] for pipeline in (one, two, three)]
    assert norms[0] == norms[1]
    assert all(norm > 0 for norm in norms[0])
    assert norms[2] == [None] * 4


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.1}, {"swap_versions": True}])
def test_an_asynchronous_run_never_applies_them(options):
    data = batches()
    with build(layers(), schedule="pipedream", **options) as pipeline:
        with pytest.raises(NonFiniteLossError, match="what was updated before stays"):
            list(pipeline.train(data))
        assert all(item.isfinite().all() for item in pipeline.state_dict().values())
    with build(layers(), schedule="pipedream", on_non_finite="skip", **options) as pipeline:
        results = list(pipeline.train(data))
        state, chain, program = pipeline.state_dict(), pipeline.chain, pipeline.programs.training(4, 0)
    assert [item.num_skipped for item in results] == [0, 1, 0, 0]
    reference = Reference(chain, adam, clip_grad_norm=options.get("clip_grad_norm"))
    parts = [{"input": a, "target": b} for x, y in data for a, b in zip(x.split(2), y.split(2), strict=True)]
    reference.train_asynchronous(parts, [program.weights[0]], 2)
    for name, tensor in reference.parameters().items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_norms_of_sparse_and_complex_gradients(kind):
    torch.manual_seed(0)
    if kind == "sparse":
        net, x = [nn.Embedding(6, 4, sparse=True), nn.Linear(4, 1)], torch.tensor([0, 2, 2, 5])
    else:
        net, x = (
            [nn.Linear(4, 4, dtype=torch.complex64), nn.Flatten(1), _Real()],
            torch.randn(4, 4, dtype=torch.complex64),
        )
    y = torch.randn(4, 1)
    norms = []
    with flat_pipeline(
        net, functional.mse_loss, optimizer=lambda pairs: torch.optim.SGD(pairs, lr=0.1), num_microbatches=2,
        clip_grad_norm=1e-3,
    ) as pipeline:  # fmt: skip
        before = pipeline.state_dict()
        norms.append(pipeline.step(x, y).gradient_norm)
        moved = [(tensor - before[name]).abs().square().sum() for name, tensor in pipeline.state_dict().items()]
    functional.mse_loss(nn.Sequential(*net)(x), y).backward()
    gradients = [
        item.grad.to_dense() if item.grad.is_sparse else item.grad for item in nn.Sequential(*net).parameters()
    ]
    norms.append(math.sqrt(sum(item.abs().square().sum().item() for item in gradients)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert math.sqrt(sum(moved)) == pytest.approx(0.1 * 1e-3, rel=1e-2)


class _Real(nn.Module):
    def forward(self, x):
        return x.abs().sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"on_non_finite": "ignore"}, "on_non_finite is 'ignore'; choose one of stop, skip"),
        ({"measure_norm": "yes"}, "measure_norm is 'yes'; give True or False"),
    ],
)
def test_other_words_are_told(options, text):
    with pytest.raises(ConfigError, match=text):
        build(layers(), **options)


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
@pytest.mark.parametrize("bad", [(math.nan, 0.0), (math.inf, -math.inf), (math.inf, 0.0)])
def test_a_loss_that_is_not_finite_counts_though_its_gradient_is(schedule, bad):
    def adding(hidden, target):
        return hidden.mean() + target.mean()

    x, y = torch.randn(4, 4), torch.zeros(4, 1)
    broken = y.clone()
    broken[0], broken[2] = bad
    with flat_pipeline(
        layers(), adding, optimizer=adam, num_microbatches=2, schedule=schedule, on_non_finite="skip"
    ) as pipeline:
        before = pipeline.state_dict()
        first, second = pipeline.train([(x, broken), (x, y)])
        assert not math.isfinite(first.loss)
        assert (first.num_skipped, second.num_skipped) == (2 if schedule == "pipedream" and bad[1] else 1, 0)
        assert not torch.equal(pipeline.state_dict()["0.weight"], before["0.weight"])
