"""What users do with metrics, predictions and outputs on one rank, and what they are told where it cannot work."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from flat_pipeline import flat_pipeline
from torch import Tensor, nn
from torch.nn import functional

from vpipe.errors import ConfigError, DataError, ExecutionError, MemoryLimitError, ModelError
from vpipe.model.chain import Block, Chain
from vpipe.model.loss import CallableLoss, Metric
from vpipe.runtime.batch import Batch
from vpipe.runtime.pipeline import Pipeline

WIDTH, CLASSES = 6, 4


def layers(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.5), nn.Linear(WIDTH, CLASSES), *more)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def build(model: Any = None, loss: Any = functional.cross_entropy, **options: Any) -> Pipeline:
    options = {"schedule": "1f1b", "num_microbatches": 4} | options
    is_chain = isinstance(model, Chain)
    return flat_pipeline(layers() if model is None else model, None if is_chain else loss, optimizer=sgd, **options)


def batch(num_samples: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, CLASSES, (num_samples,), generator=generator)
    return torch.randn(num_samples, WIDTH, generator=generator), target


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(-1) == target).float().mean()


def counted(output: Tensor, target: Tensor) -> tuple[Tensor, int]:
    kept = target > 0
    return (output.argmax(-1) == target)[kept].sum(), int(kept.sum())


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "pipedream"])
def test_numbers_are_means_over_samples_and_pairs_are_ratios(schedule: str) -> None:
    metrics = {"accuracy": accuracy, "counted": counted, "samples": lambda output, target: (len(output), 1)}
    with build(schedule=schedule, metrics=metrics) as pipeline:
        x, y = batch()
        (result,) = pipeline.train([(x, y)], outputs=True)
        assert isinstance(result.outputs, Tensor)
        right = result.outputs.argmax(-1) == y
        assert result.metrics == {
            "accuracy": right.float().mean().item(),
            "counted": (right & (y > 0)).sum().item() / (y > 0).sum().item(),
            "samples": 2.0,  # in the mean over microbatches, which is what such a pair says
        }
        held_out = [batch(5, 2), batch(3, 3)]
        found = pipeline.evaluate(held_out, 2)
        outputs = [item for item in pipeline.predict(held_out, 2) if isinstance(item, Tensor)]
        answers = torch.cat(outputs).argmax(-1) == torch.cat([target for _, target in held_out])
        assert list(found) == ["loss", "accuracy", "counted", "samples"]
        assert found["accuracy"] == answers.sum().item() / 8


def test_a_metric_of_no_targets_is_not_a_number_and_an_empty_microbatch_is_no_harm() -> None:
    with build(metrics={"counted": counted}) as pipeline:
        x, y = batch()
        y[:3] = 0
        assert 0 <= pipeline.step(x, y).metrics["counted"] <= 1
        assert pipeline.step(x, y * 0).metrics["counted"] != pipeline.step(x, y * 0).metrics["counted"]


def test_a_metric_reads_what_it_names() -> None:
    blocks = (
        Block("body", lambda: nn.Linear(WIDTH, WIDTH), ("input",), ("hidden",)),
        Block("gate", Gate, ("hidden",), ("hidden", "gate")),
        Block("head", lambda: nn.Linear(WIDTH, CLASSES), ("hidden",), ("logits",)),
    )
    chain = Chain(
        blocks,
        ("input", "target", "weight"),
        CallableLoss(functional.cross_entropy, ("logits", "target")),
        metrics={
            "open": Metric(lambda gate: gate.mean(), ("gate",)),
            "weight": Metric(lambda weight: (weight.sum(), len(weight)), ("weight",)),
        },
    )
    assert chain.crossing(2) == ("hidden", "gate")
    with build(chain, num_microbatches=2, schedule="naive", stages_per_rank=3, partition=(1, 1, 1)) as pipeline:
        x, y = batch()
        result = pipeline.step({"input": x, "target": y, "weight": torch.arange(8.0)})
        assert result.metrics["weight"] == 3.5
        assert 0 < result.metrics["open"] < 1
        (found,) = pipeline.predict([{"input": x}])
        assert isinstance(found, Tensor)
        assert found.shape == (8, CLASSES)


class Gate(nn.Module):
    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        gate = hidden.sigmoid()
        return hidden * gate, gate


def both(output: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Any]]:
    loss = functional.cross_entropy(output, target)
    return loss, {"accuracy": accuracy(output, target), "counted": counted(output, target), "logits": output}


def as_dictionary(output: Tensor, target: Tensor) -> dict[str, Any]:
    loss, others = both(output, target)
    return {"loss": loss, **others}


@pytest.mark.parametrize("function", [both, as_dictionary])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "pipedream"])
@pytest.mark.parametrize("options", [{}, {"recompute_ratio": 1.0}])
def test_a_loss_may_return_metrics_beside_itself(function: Any, schedule: str, options: dict[str, Any]) -> None:
    loss = CallableLoss(function, metrics=("accuracy", "counted"))
    own = {"accuracy": accuracy, "counted": counted}
    found = []
    for given, metrics in ((loss, {}), (lambda a, b: both(a, b)[0], own)):
        with build(loss=given, metrics=metrics, schedule=schedule, **options) as pipeline:
            results = list(pipeline.train([batch(seed=seed) for seed in range(3)]))
            found.append(([(item.loss, item.parts, item.metrics) for item in results], pipeline.evaluate([batch(5)])))
            assert list(results[0].parts) == ["loss"]
            weights = pipeline.state_dict()
        found[-1] += (torch.cat([item.flatten() for item in weights.values()]).tolist(),)
    assert found[0] == found[1]


def test_metrics_keep_no_activations() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def watching(output: Tensor, target: Tensor) -> Tensor:
        product = output.exp() * 2
        kept.append(weakref.ref(product))
        assert not product.requires_grad
        return product.mean()

    with build(metrics={"watching": watching}, num_microbatches=1) as pipeline:
        pipeline.step(*batch())
        gc.collect()
    assert [reference() for reference in kept] == [None]


def test_random_numbers_of_a_metric_are_its_own_and_the_same_every_time() -> None:
    drawn: list[float] = []

    def drawing(output: Tensor, target: Tensor) -> float:
        drawn.append(float(torch.rand(())))
        return drawn[-1]

    for _ in range(2):
        torch.manual_seed(5)
        with build(metrics={"drawing": drawing}) as pipeline:
            before = torch.get_rng_state()
            pipeline.step(*batch())
            assert torch.equal(torch.get_rng_state(), before)
    assert drawn[:4] == drawn[4:]
    assert len(set(drawn)) == 4


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        (lambda a, b: a, r"metric 'm' returned a tensor of shape \(2, 4\); it must return one number"),
        (lambda a, b: None, "metric 'm' returned NoneType"),
        (lambda a, b: (a.sum(), a), r"metric 'm' returned a tuple of a tensor of shape \(\) and a tensor of shape"),
        (lambda a, b: (1, 2, 3), "metric 'm' returned tuple"),
        (lambda a, b: a.mul_(2).sum(), r"metric 'm' changes 'hidden' in place, .*\(.clone\(\)\)"),
        (lambda a, b: a.sum() * 1j, "of complex numbers"),
    ],
)
def test_what_a_metric_may_not_do_is_told(metric: Any, text: str) -> None:
    with pytest.raises(ModelError, match=text), build(metrics={"m": metric}) as pipeline:
        pipeline.step(*batch())


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: build(metrics={"loss": accuracy}), ModelError, "metric 'loss' has the name of the loss or of a part"),
        (lambda: build(metrics=[accuracy]), ModelError, "metrics is of type list; give a dictionary"),
        (lambda: build(metrics={"a": 3}), ModelError, "a metric is 3, not a function"),
        (lambda: build(metrics={"a": nn.L1Loss}), ModelError, "not a function"),
        (
            lambda: build(metrics={"a": Metric(accuracy, ("hidden", "label"))}),
            ModelError,
            "metric 'a' reads 'label', which no earlier block writes",
        ),
        (
            lambda: build(loss=CallableLoss(both, metrics=("accuracy",)), metrics={"accuracy": accuracy}),
            ModelError,
            "metrics must differ; given more than once: 'accuracy'",
        ),
        (lambda: CallableLoss(both, metrics="accuracy"), ModelError, r"give a tuple of names: metrics=\('accuracy',\)"),  # type: ignore[arg-type]
        (lambda: CallableLoss(nn.MSELoss(), metrics=("a",)), ModelError, "torch's own losses return no 'a'"),
        (
            lambda: build(Chain.from_modules(layers(), both, metrics={"a": accuracy}), metrics={"a": accuracy}),
            ConfigError,
            "the Chain has a metric 'a' already",
        ),
        (
            lambda: Chain.from_modules(layers(), CallableLoss(Weighted(), metrics=("a",))),
            ModelError,
            "a loss with weights of its own returns its number alone, and metrics names 'a'",
        ),
    ],
)
def test_metrics_that_do_not_fit_are_told(make: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (both, r"'accuracy', 'counted', 'logits' beside the loss; say which .*metrics=\('accuracy',\)"),
        (as_dictionary, "beside the loss; say which of these are metrics"),
        (CallableLoss(both, metrics=("other",)), "and no 'other', which metrics names"),
        (CallableLoss(lambda a, b: a.sum(), metrics=("x",)), r"a tensor of shape \(\), and metrics names 'x' beside"),
    ],
)
def test_what_a_loss_returns_beside_itself_has_names(loss: Any, text: str) -> None:
    with pytest.raises(ModelError, match=text), build(loss=loss) as pipeline:
        pipeline.step(*batch())


@pytest.mark.parametrize("returned", [("loss", "accuracy"), ()])
def test_parts_that_a_loss_does_not_name_are_told(returned: tuple[str, ...]) -> None:
    class Loss:
        inputs, parts = ("hidden", "target"), ("loss",)

        def count(self, fields: Any, num_samples: int) -> dict[str, float]:
            return {"loss": float(num_samples)}

        def __call__(self, tensors: Any, totals: Any, num_samples: int) -> dict[str, Tensor]:
            return {name: tensors["hidden"].sum() for name in returned}

    text = f"the loss names the parts loss and returned {', '.join(returned) or 'nothing'}; parts are what is added"
    with build(loss=Loss()) as pipeline, pytest.raises(ModelError, match=text):
        pipeline.step(*batch())


class Weighted(nn.Module):
    """A loss with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(hidden * self.scale, target)


def test_a_loss_with_weights_is_left_out_of_predictions_and_metrics_read_what_it_reads() -> None:
    with build(loss=Weighted(), metrics={"accuracy": accuracy}) as pipeline:
        x, y = batch()
        (result,) = pipeline.train([(x, y)], outputs=True)
        assert isinstance(result.outputs, Tensor)
        assert result.outputs.shape == (8, CLASSES)
        assert result.metrics["accuracy"] == accuracy(result.outputs, y).item()
        (found,) = pipeline.predict([x])
        assert isinstance(found, Tensor)
        assert found.shape == (8, CLASSES)
        assert pipeline.step(x, y).iteration == 1  # the loss is back
        assert pipeline.evaluate([(x, y)])["loss"] > 0


class Named(NamedTuple):
    target: Tensor
    input: Tensor


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
def test_batches_to_predict_have_every_form_and_need_no_targets(schedule: str) -> None:
    x, y = batch()
    forms: list[Any] = [
        x,
        (x,),
        [x, y],
        (x, None),
        {"input": x},
        {"input": x, "target": y},
        {"input": x, "target": None},
    ]
    forms += [Named(y, x), Batch({"input": x}, 8), Batch({"input": x, "target": y}, 8)]
    with build(schedule=schedule) as pipeline:
        found = list(pipeline.predict(iter(forms)))
        model = nn.Sequential(*pipeline.held[0].weights.newest).eval()
        expected = torch.cat([model(part) for part in x.split(2)])
        model.train()
    assert len(found) == len(forms)
    assert all(isinstance(item, Tensor) and torch.equal(item, expected) for item in found)


def test_several_values_have_names() -> None:
    model = [nn.Linear(WIDTH, CLASSES), Block("two", Gate, ("hidden",), ("hidden", "gate"))]
    with build(model, num_microbatches=2) as pipeline:
        x, y = batch()
        (result,) = pipeline.train([(x, y)], outputs=True)
        (found,) = pipeline.predict([x])
        assert isinstance(found, dict)
        assert isinstance(result.outputs, dict)
        assert list(found) == list(result.outputs) == ["hidden", "gate"]
        assert all(item.shape == (8, CLASSES) for item in (*found.values(), *result.outputs.values()))


class Same(nn.Module):
    """Returns its input itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Bias(nn.Module):
    """Returns its weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


def test_outputs_are_the_callers_own() -> None:
    x, _ = batch()
    with build([Same()], lambda a, b: a.mean(), num_microbatches=1) as pipeline:
        (found,) = pipeline.predict([x])
        assert isinstance(found, Tensor)
        found.zero_()
        assert x.abs().sum() > 0
    with build([nn.Linear(WIDTH, 2), Bias()], num_microbatches=4) as pipeline:
        results = [result.outputs for result in pipeline.train([batch(8, 1), batch(8, 2)], outputs=True)]
        assert isinstance(results[0], Tensor)
        assert results[0].abs().sum() == 0  # as it was before the update
        assert isinstance(results[1], Tensor)
        assert results[1].abs().sum() > 0


@pytest.mark.parametrize(("limit", "ahead"), [(None, 64), (1 << 30, 8)])
def test_batches_are_yielded_in_their_order_and_not_long_after_they_were_read(limit: int | None, ahead: int) -> None:
    read: list[int] = []

    def batches() -> Iterator[Tensor]:
        for number in range(200):
            read.append(number)
            yield torch.full((1 if number == 5 else 2, WIDTH), float(number))  # one piece that is like no other

    with build([Same()], lambda a, b: a.mean(), schedule="gpipe", limit=limit) as pipeline:
        for number, found in enumerate(pipeline.predict(batches(), 2)):
            assert isinstance(found, Tensor)
            assert (found == number).all()
            assert len(read) - number <= ahead
    assert number == 199


def test_of_nothing_there_are_no_predictions() -> None:
    with build() as pipeline:
        assert list(pipeline.predict([])) == []


def test_training_goes_on_in_the_middle_of_predictions() -> None:
    x, y = batch()
    with build() as pipeline:
        for _ in pipeline.predict([x] * 3):
            pipeline.step(x, y)
            assert pipeline.held[0].weights.newest[2].training
        assert pipeline.iteration == 3


def test_predictions_that_nobody_takes_are_told() -> None:
    x, y = batch()
    with build() as pipeline:
        pipeline.predict([x])
        with pytest.raises(ExecutionError, match=r"predict\(\) was called and .* so it has computed nothing; .*list\("):
            pipeline.step(x, y)


def test_in_the_middle_of_training_there_are_no_predictions() -> None:
    x, y = batch()
    with build(schedule="pipedream") as pipeline:
        results = pipeline.train([(x, y)] * 3)
        next(results)
        with pytest.raises(ExecutionError, match=r"an earlier train\(\) did not get to its last batch"):
            list(pipeline.predict([x]))
        list(results)
        assert len(list(pipeline.predict([x]))) == 1


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"target": torch.zeros(8)}, "the batch has no fields; the model reads input"),
        ({"inputs": torch.zeros(8, WIDTH)}, "has a field 'inputs' that the model does not read; it reads input"),
        ((torch.zeros(8, WIDTH),) * 3, "the batch has 3 tensors and the model reads 1 fields: input"),
    ],
)
def test_a_batch_without_what_blocks_read_is_told(data: Any, text: str) -> None:
    with build() as pipeline, pytest.raises(DataError, match=text):
        list(pipeline.predict([data]))


def test_a_missing_field_of_several_is_told() -> None:
    class Add(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    model = [Block("add", Add, ("input", "other"), ("hidden",)), nn.Linear(WIDTH, CLASSES)]
    chain = Chain.from_modules(model, functional.cross_entropy, fields=("input", "other", "target"), metrics={})
    chain = Chain(chain.blocks, chain.fields, CallableLoss(functional.cross_entropy))
    with build(chain) as pipeline, pytest.raises(DataError, match="reads the field 'other', which the data does not"):
        list(pipeline.predict([{"input": torch.zeros(8, WIDTH)}]))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


def test_outputs_without_rows_are_told() -> None:
    x, _ = batch()
    with build(layers(Mean()), lambda a, b: a) as pipeline:
        with pytest.raises(ModelError, match=r"writes 'hidden' in the shapes \(\), which are no rows of one batch"):
            list(pipeline.predict([x]))
        (found,) = pipeline.predict([x], 8)
        assert isinstance(found, Tensor)
        assert found.shape == ()


def test_outputs_count_towards_a_limit() -> None:
    model = [nn.Linear(WIDTH, 4096)]
    x = torch.zeros(64, WIDTH)
    with build(model, lambda a, b: a.mean(), num_microbatches=1) as pipeline:
        pipeline.step(x[:8], x[:8, 0])
        limit = pipeline.ledger.peak.total
    with build(model, lambda a, b: a.mean(), num_microbatches=1, limit=limit) as pipeline:
        assert len(list(pipeline.predict([x[:8]]))) == 1
        with pytest.raises(MemoryLimitError):
            list(pipeline.predict([x]))
