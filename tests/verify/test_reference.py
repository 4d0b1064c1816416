"""The oracle against plain PyTorch and against closed forms."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from vpipe.errors import DataError, PlanError, ScheduleError
from vpipe.model.chain import Block, Chain
from vpipe.model.loss import CallableLoss
from vpipe.model.rng import derive_seed
from vpipe.runtime.weights.clipping import global_norm
from vpipe.schedule.weights import StageWeights
from vpipe.verify.reference import Reference, ReferenceResult

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
MSE = CallableLoss(functional.mse_loss)


def _model(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.Dropout(dropout), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)
    )


def _microbatches(num_microbatches: int, size: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input": torch.randn(size, 6, generator=generator), "target": torch.randn(size, 2, generator=generator)}
        for _ in range(num_microbatches)
    ]


def _usage(versions: Sequence[int], updates: Sequence[int]) -> StageWeights:
    staleness = tuple(update - version for update, version in zip(updates, versions, strict=True))
    return StageWeights(tuple(versions), tuple(updates), staleness, 1 + max(staleness), 1 + max(staleness))


def _delayed(delay: int, num_microbatches: int) -> StageWeights:
    return _usage([max(0, k - delay) for k in range(num_microbatches)], range(num_microbatches))


def _assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
@pytest.mark.parametrize("partition", [None, [2, 3, 1]])
def test_synchronous_training_is_plain_pytorch(
    optimizer: partial[torch.optim.Optimizer], partition: list[int] | None
) -> None:
    model = _model()
    reference = Reference(Chain.from_modules(model, MSE), optimizer, partition=partition)
    plain = copy.deepcopy(model)
    steps = optimizer(plain.parameters())
    for iteration in range(3):
        batch = _microbatches(4, seed=iteration)
        result = reference.train_batch(batch)
        steps.zero_grad()
        losses = []
        for fields in batch:
            loss = functional.mse_loss(plain(fields["input"]), fields["target"]) * (3 / 12)
            loss.backward()
            losses.append(loss.item())
        _assert_same(result.gradients[0], {name: p.grad for name, p in plain.named_parameters() if p.grad is not None})
        steps.step()
        assert [share["loss"] for share in result.losses] == losses
        assert result.batch_parts(4)[0]["loss"] == pytest.approx(sum(losses), rel=1e-12)
    _assert_same(reference.parameters(), dict(plain.named_parameters()))


def test_the_users_model_and_random_state_are_left_alone() -> None:
    model = _model(0.5)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    reference = Reference(Chain.from_modules(model, MSE), SGD, partition=[3, 3])
    reference.train_batch(_microbatches(2))
    reference.train_asynchronous(_microbatches(4), [_delayed(1, 4), _delayed(0, 4)], 2)
    _assert_same(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_a_function_of_seed_iteration_microbatch_and_block() -> None:
    chain = Chain.from_modules(nn.Sequential(nn.Identity(), nn.Dropout(0.5)), CallableLoss(_mean, ("hidden",)))
    reference = Reference(chain, SGD, seed=5)
    ones = {"input": torch.ones(1, 64), "target": torch.ones(1, 1)}
    for iteration in range(2):
        result = reference.train_batch([ones, ones])
        for microbatch, share in enumerate(result.losses):
            torch.manual_seed(derive_seed(5, "dropout", iteration, microbatch, 1))
            expected = functional.dropout(torch.ones(1, 64), 0.5).mean() * 0.5
            assert share["loss"] == expected.item()


def _mean(hidden: Tensor) -> Tensor:
    return hidden.mean()


def test_asynchronous_dropout_counts_iterations_of_num_microbatches() -> None:
    chain = Chain.from_modules(_model(0.5), MSE)
    batches = [_microbatches(2, seed=seed) for seed in range(3)]
    frozen = partial(torch.optim.SGD, lr=0.0)
    one_by_one = Reference(chain, frozen)
    losses = [2 * share["loss"] for batch in batches for share in one_by_one.train_batch(batch).losses]
    stream = Reference(chain, frozen, partition=[6])
    first = stream.train_asynchronous([*batches[0], *batches[1]], [_delayed(0, 4)], 2)
    second = stream.train_asynchronous(batches[2], [_delayed(0, 2)], 2)
    assert [share["loss"] for share in (*first.losses, *second.losses)] == losses
    assert stream.iteration == 3


@pytest.mark.parametrize("optimizer", [SGD, ADAM])
def test_without_staleness_asynchronous_training_is_plain_training_per_microbatch(
    optimizer: partial[torch.optim.Optimizer],
) -> None:
    model = _model()
    reference = Reference(Chain.from_modules(model, MSE), optimizer, partition=[1, 3, 2])
    stream = _microbatches(8)
    result = reference.train_asynchronous(stream, [_delayed(0, 8)] * 3, 4)
    plain = copy.deepcopy(model)
    steps = optimizer(plain.parameters())
    for fields, gradients, share in zip(stream, result.gradients, result.losses, strict=True):
        steps.zero_grad()
        loss = functional.mse_loss(plain(fields["input"]), fields["target"])
        loss.backward()
        _assert_same(gradients, {name: p.grad for name, p in plain.named_parameters() if p.grad is not None})
        steps.step()
        assert share["loss"] == loss.item()
    _assert_same(reference.parameters(), dict(plain.named_parameters()))
    means = [sum(share["loss"] for share in result.losses[start : start + 4]) / 4 for start in (0, 4)]
    assert [parts["loss"] for parts in result.batch_parts(4)] == pytest.approx(means, rel=1e-12)


class _Quadratic(nn.Module):
    """Adds ``(w - centre)**2 / 2`` to what it gets, so that each stage descends its own parabola."""

    def __init__(self, centre: float) -> None:
        super().__init__()
        self.centre = centre
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, total: Tensor) -> Tensor:
        return total + (self.w - self.centre) ** 2 / 2


def _parabolas(num_stages: int) -> Chain:
    blocks = [_Quadratic(1.0 + stage) for stage in range(num_stages)]
    return Chain.from_modules(blocks, CallableLoss(_mean, ("hidden",)))


def _numbers(count: int) -> list[dict[str, Tensor]]:
    return [{"input": torch.zeros(1, dtype=torch.float64), "target": torch.zeros(1)} for _ in range(count)]


def test_delays_follow_the_recurrence() -> None:
    num_stages, count, rate = 4, 12, 0.1
    reference = Reference(_parabolas(num_stages), SGD, partition=[1] * num_stages)
    usage = [_delayed(num_stages - 1 - stage, count) for stage in range(num_stages)]
    result = reference.train_asynchronous(_numbers(count), usage, 4)
    for stage in range(num_stages):
        weights = [0.0]
        for step in range(count):
            stale = weights[max(0, step - (num_stages - 1 - stage))]
            gradient = stale - (1.0 + stage)
            assert result.gradients[step][f"{stage}.w"].item() == pytest.approx(gradient, rel=1e-13)
            weights.append(weights[-1] - rate * gradient)
        assert reference.parameters()[f"{stage}.w"].item() == pytest.approx(weights[-1], rel=1e-13)


def test_macrobatch_accumulates_over_versions_that_are_one_update_old() -> None:
    # Updates of 2 microbatches: w(t+1) = w(t) - rate * g(w(t-1)), with the mean gradient of the group.
    updates = [0, 0, 1, 1, 2, 2]
    reference = Reference(_parabolas(2), SGD, partition=[1, 1])
    result = reference.train_asynchronous(_numbers(6), [_usage([max(0, u - 1) for u in updates], updates)] * 2, 2)
    weights = [0.0]
    for step in range(3):
        weights.append(weights[-1] - 0.1 * (weights[max(0, step - 1)] - 1.0))
        assert len(result.gradients) == 3
    assert reference.parameters()["0.w"].item() == pytest.approx(weights[-1], rel=1e-13)
    assert len(result.batch_parts(2)) == 3
    assert result.batch_parts(2)[0]["loss"] == pytest.approx(0.5 + 2.0)


def test_every_stage_clips_by_its_own_norm_in_asynchronous_training() -> None:
    reference = Reference(_parabolas(3), SGD, partition=[1, 1, 1], clip_grad_norm=2.0)
    result = reference.train_asynchronous(_numbers(1), [_delayed(0, 1)] * 3, 1)
    assert result.norms == ((1.0, 2.0, 3.0),)
    assert [result.gradients[0][f"{stage}.w"].item() for stage in range(3)] == pytest.approx(
        [-1.0, -2.0 * 2.0 / 2.000001, -3.0 * 2.0 / 3.000001], rel=1e-13
    )


@pytest.mark.parametrize("width", [100, 128, 129, 300])
def test_the_norm_of_a_large_parameter_is_added_as_the_pipeline_adds_it(width: int) -> None:
    torch.manual_seed(width)
    chain = Chain.from_modules([nn.Linear(256, width), nn.Tanh(), nn.Linear(width, 1)], MSE)
    reference = Reference(chain, SGD, partition=[3], clip_grad_norm=1e9)
    result = reference.train_batch([{"input": torch.randn(8, 256), "target": torch.randn(8, 1)}])
    (gradients,) = result.gradients
    assert max(item.numel() for item in gradients.values()) == 256 * width
    assert result.norms[0][0] == global_norm(list(enumerate(gradients.values())), len(gradients))


def test_synchronous_clipping_uses_the_norm_of_all_stages() -> None:
    reference = Reference(_parabolas(2), SGD, partition=[1, 1], clip_grad_norm=1.0)
    result = reference.train_batch(_numbers(2))
    norm = 5.0**0.5
    assert result.norms[0][0] == pytest.approx(norm, rel=1e-13)
    assert result.gradients[0]["1.w"].item() == pytest.approx(-2.0 / (norm + 1e-6), rel=1e-13)


def test_learning_rate_is_asked_for_the_progress_of_each_update() -> None:
    asked: list[float] = []

    def rate(progress: float) -> float:
        asked.append(progress)
        return 0.0

    reference = Reference(_parabolas(2), SGD, partition=[1, 1], learning_rate=rate)
    reference.train_batch(_numbers(4))
    reference.train_asynchronous(_numbers(4), [_delayed(1, 4), _delayed(0, 4)], 4)
    reference.train_batch(_numbers(4))
    assert sorted(set(asked)) == [0.0, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert [value.item() for value in reference.parameters().values()] == [0.0, 0.0]


def _tied_chain() -> tuple[Chain, nn.Sequential]:
    torch.manual_seed(0)
    first, last = nn.Linear(6, 6), nn.Linear(6, 6)
    last.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), last)
    return Chain.from_modules(model, CallableLoss(_wide_loss)), model


def _wide_loss(hidden: Tensor, target: Tensor) -> Tensor:
    return (hidden.mean(1) - target.mean(1)).square().mean()


def test_tied_weights_get_the_sum_and_stay_equal() -> None:
    chain, model = _tied_chain()
    reference = Reference(chain, SGD, partition=[1, 2], clip_grad_norm=0.05)
    batch = _microbatches(1)
    result = reference.train_batch(batch)
    plain = copy.deepcopy(model)
    _wide_loss(plain(batch[0]["input"]), batch[0]["target"]).backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
    assert norm > 0.05
    assert result.norms[0][0] == pytest.approx(norm.item(), rel=1e-5)
    torch.testing.assert_close(result.gradients[0]["0.weight"], plain[0].weight.grad)
    parameters = reference.parameters()
    assert torch.equal(parameters["0.weight"], parameters["2.weight"])


def test_tied_weights_across_stages_are_refused_in_asynchronous_training() -> None:
    chain, _ = _tied_chain()
    with pytest.raises(PlanError, match=r"0\.weight and 2\.weight are one weight on stages \[0, 1\]"):
        Reference(chain, SGD, partition=[1, 2]).train_asynchronous(_microbatches(1), [_delayed(0, 1)] * 2, 1)
    one_stage = Reference(chain, SGD)
    one_stage.train_asynchronous(_microbatches(2), [_delayed(0, 2)], 1)
    parameters = one_stage.parameters()
    assert torch.equal(parameters["0.weight"], parameters["2.weight"])


def test_buffers_have_one_version() -> None:
    chain = Chain.from_modules(nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2)), MSE)
    reference = Reference(chain, SGD, partition=[1, 1])
    reference.train_asynchronous(_microbatches(5), [_delayed(1, 5), _delayed(0, 5)], 5)
    assert reference.buffers()["1.num_batches_tracked"].item() == 5


def test_frozen_parameters_stay() -> None:
    model = _model()
    model[0].weight.requires_grad_(False)
    reference = Reference(Chain.from_modules(model, MSE), SGD, partition=[1, 5])
    result = reference.train_asynchronous(_microbatches(3), [_delayed(1, 3), _delayed(0, 3)], 3)
    reference.train_batch(_microbatches(2))
    assert "0.weight" not in result.gradients[0]
    assert torch.equal(reference.parameters()["0.weight"], model[0].weight)


def test_stages_without_parameters_and_skip_connections() -> None:
    blocks = [
        Block("a", partial(nn.Linear, 6, 2), ("input",), ("left",)),
        Block("b", nn.ReLU, ("left",), ("right",)),
        Block("c", _Add, ("left", "right"), ("hidden",)),
    ]
    reference = Reference(Chain(tuple(blocks), ("input", "target"), MSE), SGD, partition=[1, 1, 1])
    assert reference.train_batch(_microbatches(2)).gradients[0].keys() == {"a.weight", "a.bias"}
    result = reference.train_asynchronous(_microbatches(3), [_delayed(delay, 3) for delay in (2, 1, 0)], 3)
    assert result.gradients[2].keys() == {"a.weight", "a.bias"}


class _Add(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right


def test_gradients_need_not_be_kept() -> None:
    reference = Reference(_parabolas(1), SGD, keep_gradients=False)
    result: ReferenceResult = reference.train_asynchronous(_numbers(2), [_delayed(0, 2)], 1)
    assert result.gradients == ({}, {})


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match=r"\[2, 3\] has 5 blocks in all, but the model has 6"):
        Reference(Chain.from_modules(_model(), MSE), SGD, partition=[2, 3])
    reference = Reference(_parabolas(2), SGD, partition=[1, 1])
    with pytest.raises(ScheduleError, match="1 stages but the partition has 2"):
        reference.train_asynchronous(_numbers(2), [_delayed(0, 2)], 1)
    with pytest.raises(DataError, match=r"got 3 microbatches; the schedule has \[2\]"):
        reference.train_asynchronous(_numbers(3), [_delayed(0, 2)] * 2, 1)
    with pytest.raises(DataError, match="an iteration 2"):
        reference.train_asynchronous(_numbers(3), [_delayed(0, 3)] * 2, 2)
    with pytest.raises(ScheduleError, match="out of order"):
        reference.train_asynchronous(_numbers(2), [_usage([0, 0], [1, 0])] * 2, 1)
    with pytest.raises(ScheduleError, match="microbatch 1 needs weight version 2 of stage 0, which has made 1 updates"):
        reference.train_asynchronous(_numbers(3), [_usage([0, 2, 2], [0, 1, 2])] * 2, 1)
