"""The library's front door on one rank: what goes in and out, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from flat_pipeline import flat_pipeline
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vpipe.data.source import FieldSpec
from vpipe.errors import ConfigError, DataError, ExecutionError, ModelError, NonFiniteLossError, PlanError
from vpipe.model.chain import Block, Chain
from vpipe.model.loss import CallableLoss
from vpipe.runtime.batch import Batch
from vpipe.runtime.hooks import Hooks

WIDTH = 4
SCHEDULES = ("1f1b", "pipedream")


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.fixture
def build():
    """Return a function that makes pipelines, which leave their process group at the end of the test."""
    made = []

    def make(model=None, loss=nn.functional.mse_loss, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 1)) if model is None else model
        options.setdefault("optimizer", sgd)
        made.append(flat_pipeline(model, loss, **options))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.close()


def batch(number=0, size=4):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(size, WIDTH, generator=generator), torch.randn(size, 1, generator=generator)


def test_batches_are_tuples_dictionaries_or_loaders(build):
    x, y = batch()
    pipeline = build(num_microbatches=2)
    losses = [build(num_microbatches=2).step(x, y).loss, build(num_microbatches=2).step(target=y, input=x).loss]
    for data in ([(x, y)], [[x, y]], [{"input": x, "target": y}], [Batch({"target": y, "input": x}, 4)]):
        losses += [result.loss for result in build(num_microbatches=2).train(data)]
    losses += [result.loss for result in build(num_microbatches=2).train(DataLoader(TensorDataset(x, y), 4))]
    assert len(losses) == 7
    assert set(losses) == {pipeline.step(x, y).loss}


def test_results_tell_iteration_loss_and_parts(build):
    pipeline = build(num_microbatches=2)
    first, second = pipeline.train(map(batch, range(2)))
    assert (first.iteration, second.iteration, pipeline.iteration) == (0, 1, 2)
    assert first.parts == {"loss": first.loss}
    assert first.gradient_norm is None
    assert build(clip_grad_norm=1.0).step(*batch()).gradient_norm > 0


def test_by_default_there_are_two_microbatches_per_rank(build):
    assert build().programs.num_microbatches == 2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_callers_random_numbers_go_on_as_if_nothing_happened(build, schedule):
    """A rank must draw the same batch as every other rank, whatever its blocks drew."""
    pipeline = build(schedule=schedule, recompute_ratio=1.0)
    torch.manual_seed(7)
    expected = [torch.rand(3) for _ in range(4)]
    torch.manual_seed(7)
    found = []

    def batches():
        for number in range(3):
            found.append(torch.rand(3))
            yield batch(number)

    list(pipeline.train(batches(), 3))
    pipeline.evaluate([batch()])
    found.append(torch.rand(3))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def test_a_synchronous_training_may_be_left_between_two_batches(build):
    whole, broken = build(num_microbatches=2), build(num_microbatches=2)
    expected = [result.loss for result in whole.train(map(batch, range(4)))]
    losses = []
    for result in broken.train(map(batch, range(4))):
        losses.append(result.loss)
        if len(losses) == 2:
            break
    assert broken.iteration == 2
    losses += [result.loss for result in broken.train(map(batch, range(2, 4)))]
    assert losses == expected


def test_an_asynchronous_training_may_not(build):
    pipeline = build(schedule="pipedream")
    next(pipeline.train([batch()] * 3))
    with pytest.raises(ExecutionError, match="did not get to its last batch, so microbatches are still in flight"):
        pipeline.step(*batch())
    with pytest.raises(ExecutionError, match="take all of its results, or give it the num_batches that you want"):
        pipeline.evaluate([batch()])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_batches_are_no_training(build, schedule):
    pipeline = build(schedule=schedule)
    assert list(pipeline.train([])) == list(pipeline.train(iter([]), 0)) == []
    assert pipeline.iteration == 0


def test_an_iterator_needs_a_number_where_the_pipeline_has_to_drain(build):
    with pytest.raises(ConfigError, match="pass num_batches"):
        build(schedule="pipedream").train(iter([batch()]))
    assert len(list(build().train(iter([batch()])))) == 1
    assert len(list(build(schedule="pipedream").train(iter([batch()] * 5), 2))) == 2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_data_that_ends_early_is_told(build, schedule):
    with pytest.raises(DataError, match="batch 2 was expected but the data ended; give a num_batches that exists"):
        list(build(schedule=schedule).train([batch()] * 2, 3))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_batch_without_samples_is_told_before_anything_runs(build, schedule):
    actions = []
    hooks = Hooks(record=lambda action, start, end: actions.append(action))
    pipeline = build(schedule=schedule, num_microbatches=3, hooks=hooks)
    with pytest.raises(DataError, match="a batch has 0 samples; leave such batches out"):
        pipeline.step(*batch(size=0))
    assert actions == []
    assert math.isfinite(pipeline.step(*batch(size=4)).loss)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_batches_may_differ_in_size(build, schedule):
    assert len(list(build(schedule=schedule).train([batch(size=4), batch(size=2), batch(size=1)]))) == 3


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ((batch()[0],), "has 1 tensors and the model reads 2 fields: input, target"),
        ((*batch(), batch()[0]), "has 3 tensors and the model reads 2 fields"),
        ({"input": batch()[0]}, "the model reads the field 'target', which the data does not have; it has input"),
        ({"input": batch()[0], "label": batch()[1]}, "a field 'label' that the model does not read"),
    ],
)
def test_wrong_fields_are_told(build, data, text):
    with pytest.raises(DataError, match=text):
        list(build().train([data]))


def test_field_specs_stand_for_fields_that_a_rank_does_not_have(build):
    specs = {"input": FieldSpec((WIDTH,), torch.float32), "target": FieldSpec((1,), torch.float32)}
    with pytest.raises(
        DataError, match="this rank reads the field 'target', which batch 0 does not have; it has input"
    ):
        build(field_specs=specs).step(input=batch()[0])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"optimizer": None}, ConfigError, "optimizer is of type NoneType; give a function"),
        ({"optimizer": lambda parameters: parameters}, ConfigError, "returned list, not a torch.optim.Optimizer"),
        ({"loss": None}, ConfigError, "modules need a loss, and none was given"),
        ({"partition": [1, 2]}, PlanError, r"partition \[1, 2\] has 2 entries for 1 stages"),
        ({"partition": [2]}, PlanError, "has 2 blocks in all, and the model has 3; add 1"),
        ({"partition": "even"}, PlanError, "partition 'even' is unknown; give blocks per stage, 'uniform' or 'param"),
        ({"schedule": "naive", "stages_per_rank": 4}, PlanError, "cannot cut 3 blocks into 4 stages; use at most 3"),
        ({"recompute_ratio": 2}, PlanError, "gives stage 0 the ratio 2.0"),
        ({"recompute": "maybe"}, ConfigError, "recompute is 'maybe'"),
        ({"clip_grad_norm": -1}, ConfigError, "clip_grad_norm is -1"),
        ({"model": 3}, ModelError, "a chain is made of an nn.Sequential or a list of modules, not of int"),
    ],
)
def test_what_does_not_fit_together_is_told(build, options, error, text):
    with pytest.raises(error, match=text):
        build(**options)


def test_parameters_that_blocks_share_unsaid_are_told(build):
    shared = nn.Linear(WIDTH, WIDTH)
    blocks = tuple(Block(name, lambda: shared, ("input",), ("hidden",)) for name in ("a", "b"))
    blocks = (blocks[0], Block("b", lambda: shared, ("hidden",), ("hidden",)))
    chain = Chain(blocks, ("input", "target"), CallableLoss(nn.functional.mse_loss))
    with pytest.raises(ModelError, match=r"'a.weight' and 'b.weight' are one parameter; .* Chain\(tied=...\)"):
        build(chain, None)


def test_names_that_two_parameters_have_are_told(build):
    blocks = (
        Block("a", lambda: nn.Linear(WIDTH, WIDTH), ("input",), ("hidden",), keys=(("", "same."),)),
        Block("b", lambda: nn.Linear(WIDTH, WIDTH), ("hidden",), ("hidden",), keys=(("", "same."),)),
    )
    chain = Chain(blocks, ("input", "target"), CallableLoss(nn.functional.mse_loss))
    with pytest.raises(ModelError, match=r"two parameters of the model have the name 'same.weight'"):
        build(chain, None)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_loss_that_is_no_number_stops_the_training(build, schedule):
    x, y = batch()
    pipeline = build(schedule=schedule)
    with pytest.raises(
        NonFiniteLossError, match=r"the loss became nan .*clip gradients \(clip_grad_norm\), look for empty"
    ):
        list(pipeline.train([(x, y), (x * math.nan, y), (x, y)]))
    assert next(iter(pipeline.train([(x, y)]))).loss > 0


def test_an_evaluation_leaves_every_part_in_its_mode(build):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH).eval(), nn.Dropout(0.5), nn.Linear(WIDTH, 1))
    pipeline = build(model)
    modes = [part.training for part in pipeline.held[0].weights.newest.modules()]
    statistics = pipeline.state_dict()["1.running_mean"].clone()
    first, second = pipeline.evaluate([batch()]), pipeline.evaluate([batch()])
    assert first == second
    assert [part.training for part in pipeline.held[0].weights.newest.modules()] == modes
    assert modes.count(False) == 1
    assert torch.equal(pipeline.state_dict()["1.running_mean"], statistics)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_evaluation_does_not_depend_on_how_samples_are_cut(build, schedule):
    pipeline = build(schedule=schedule)
    list(pipeline.train([batch()] * 2))
    x, y = batch(3, 7)
    whole = pipeline.evaluate([(x, y)])["loss"]
    parts = pipeline.evaluate([(x[:3], y[:3]), (x[3:6], y[3:6]), (x[6:], y[6:])])["loss"]
    assert whole == pytest.approx(parts, rel=1e-6)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, 1)).eval()
    model.load_state_dict(pipeline.state_dict())
    assert whole == pytest.approx(nn.functional.mse_loss(model(x), y).item(), rel=1e-6)


def test_the_learning_rate_follows_the_iterations(build):
    asked = []

    def rate(iterations):
        asked.append(iterations)
        return 0.0

    list(build(learning_rate=rate, num_microbatches=4).train([batch()] * 3))
    assert asked == [0, 1, 2]
    asked.clear()
    pipeline = build(learning_rate=rate, num_microbatches=4, schedule="pipedream")
    list(pipeline.train([batch()] * 2))
    assert asked == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]
    assert pipeline.held[0].weights.optimizer.param_groups[0]["lr"] == 0


def test_hooks_see_actions_and_gradients(build):
    seen, gradients = [], []
    hooks = Hooks(
        record=lambda action, start, end: seen.append((str(action), end >= start)),
        gradients=lambda stage, microbatch, named: gradients.append((stage, microbatch, sorted(named))),
    )
    build(hooks=hooks, num_microbatches=2).step(*batch())
    assert seen == [(action, True) for action in ("0F0", "0F1", "0B0", "0B1", "0STEP1")] or seen == [
        (action, True) for action in ("0F0", "0B0", "0F1", "0B1", "0STEP1")
    ]
    assert gradients == [(0, 1, ["0.bias", "0.weight", "2.bias", "2.weight"])]


def test_the_state_is_that_of_the_sequential(build):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1))
    pipeline = build(model)
    assert pipeline.state_dict().keys() == model.state_dict().keys()
    before = model.state_dict()["0.weight"].clone()
    pipeline.step(*batch())
    assert not torch.equal(pipeline.state_dict()["0.weight"], before)
    assert torch.equal(model[0].weight, before)  # the user's own module is only a pattern


def test_a_pipeline_leaves_the_group_that_it_made(build):
    with build():
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()
