"""Losses that are no mean over samples: a batch in microbatches has the loss and the update of the whole batch."""

from __future__ import annotations

import random
import threading
from functools import partial

import pytest
import torch
from flat_pipeline import flat_pipeline
from torch import nn
from torch.nn import functional

from vpipe.errors import ConfigError, ModelError
from vpipe.model.chain import Block, Chain
from vpipe.model.loss import CallableLoss
from vpipe.verify.reference import Reference

CLASSES = 5
SCHEDULES = ("1f1b", "gpipe", "zb-h1")
WEIGHT = torch.tensor([1.0, 10.0, 0.1, 3.0, 0.5])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def layers(width=CLASSES):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, width))


def classes(missing=(1, 2, 5)):
    """Return 8 samples and their classes, of which some are no targets: those of microbatch 0 of 4 among them."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, CLASSES, (8,), generator=generator)
    target[list(missing)] = -100
    return torch.randn(8, 6, generator=generator), target


def plain_step(net, loss, x, y):
    """Return the loss and the weights after one step of plain torch on the whole batch."""
    optimizer = sgd(net.parameters())
    value = loss(net(x), y)
    value.backward()
    optimizer.step()
    return value.item(), {name: item.detach() for name, item in net.state_dict().items()}


def assert_like_whole_batch(net, loss, x, y, num_microbatches, schedule="1f1b"):
    with flat_pipeline(
        net, loss, optimizer=sgd, num_microbatches=num_microbatches, schedule=schedule, stages_per_rank=1
    ) as pipeline:
        found = pipeline.step(x, y).loss
        state = pipeline.state_dict()
    value, weights = plain_step(net, loss, x, y)
    assert found == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(state, weights)


TARGET_LOSSES = {
    "ignoring": functional.cross_entropy,
    "ignoring 3": partial(functional.cross_entropy, ignore_index=3),
    "weights": nn.CrossEntropyLoss(weight=WEIGHT),
    "weights, smoothed": nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
    "smoothed": partial(functional.cross_entropy, label_smoothing=0.2),
    "sum": partial(functional.cross_entropy, reduction="sum"),
    "weighted sum": nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"),
}


@pytest.mark.parametrize("num_microbatches", [1, 2, 4, 8])
@pytest.mark.parametrize("name", TARGET_LOSSES)
def test_targets_that_count_differently_are_counted_over_the_whole_batch(name, num_microbatches):
    x, y = classes((3,) if name == "ignoring 3" else (0, 1, 2, 5))
    y = y.clamp(min=0) if name == "ignoring 3" else y
    assert_like_whole_batch(layers(), TARGET_LOSSES[name], x, y, num_microbatches)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_microbatch_without_targets_is_zero(schedule):
    x, y = classes((0, 1))
    assert_like_whole_batch(layers(), nn.CrossEntropyLoss(), x, y, 4, schedule)
    assert_like_whole_batch(
        nn.Sequential(*layers(), nn.LogSoftmax(-1)), partial(functional.nll_loss, weight=WEIGHT), x, y, 4, schedule
    )


def test_an_update_without_targets_is_none():
    x, _ = classes()
    with flat_pipeline(
        layers(), functional.cross_entropy, optimizer=sgd, schedule="pipedream", num_microbatches=4
    ) as p:
        (result,) = p.train([(x, classes((0, 1))[1])])
    assert result.loss == result.loss > 0


def test_targets_of_several_positions_and_probabilities():
    torch.manual_seed(3)
    x, ids = torch.randn(8, 6), torch.randint(0, CLASSES, (8, 7))
    ids[torch.rand(8, 7) < 0.6] = -100
    net = nn.Sequential(nn.Linear(6, 7 * CLASSES), nn.Unflatten(1, (CLASSES, 7)))
    assert_like_whole_batch(net, functional.cross_entropy, x, ids, 4)
    assert_like_whole_batch(layers(), functional.cross_entropy, x, torch.rand(8, CLASSES).softmax(-1), 4)


ELEMENT_LOSSES = {
    "mse": functional.mse_loss,
    "mse sum": nn.MSELoss(reduction="sum"),
    "l1": nn.L1Loss(),
    "huber sum": partial(functional.huber_loss, reduction="sum"),
    "logits": nn.BCEWithLogitsLoss(pos_weight=WEIGHT),
    "kl": nn.KLDivLoss(reduction="batchmean"),
    "kl sum": nn.KLDivLoss(reduction="sum"),
    "soft margin": nn.SoftMarginLoss(),
}


@pytest.mark.parametrize("name", ELEMENT_LOSSES)
def test_means_over_elements_and_sums(name):
    torch.manual_seed(3)
    assert_like_whole_batch(layers(), ELEMENT_LOSSES[name], torch.randn(8, 6), torch.rand(8, CLASSES), 4)


def test_one_microbatch_has_the_bits_of_the_function_itself():
    x, y = classes()
    for name, loss in TARGET_LOSSES.items():
        y = y.clamp(min=0) if name == "ignoring 3" else y
        with flat_pipeline(layers(), loss, optimizer=sgd, num_microbatches=1) as pipeline:
            assert pipeline.step(x, y).loss == loss(layers()(x), y).item()


def test_an_object_with_the_methods_of_a_loss_is_one():
    class Counted:
        inputs, parts = ("hidden", "target"), ("loss",)

        def count(self, fields, num_samples):
            return {"loss": float(fields["target"].ge(0).sum())}

        def __call__(self, tensors, totals, num_samples):
            total = functional.cross_entropy(tensors["hidden"], tensors["target"], reduction="sum")
            return {"loss": total / totals["loss"]}

    x, y = classes()
    with flat_pipeline(layers(), Counted(), optimizer=sgd, num_microbatches=4) as pipeline:
        assert pipeline.step(x, y).loss == pytest.approx(functional.cross_entropy(layers()(x), y).item(), rel=1e-5)


def ignoring(hidden, target):
    return functional.cross_entropy(hidden, target)


def adding(hidden, target):
    return (hidden.mean(-1) - target).square().sum()


def comparing(hidden, target):
    return functional.cross_entropy(hidden @ hidden.T, torch.arange(len(hidden)))


@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
@pytest.mark.parametrize(
    ("loss", "told"),
    [(ignoring, "no mean over samples"), (adding, r"\(their sum is right\)"), (comparing, "reduction='mean'")],
)
def test_other_functions_are_tried_on_the_first_batch(loss, told, num_microbatches):
    x, y = classes((1, 5))
    with (
        pytest.raises(ModelError, match=told),
        flat_pipeline(layers(), loss, optimizer=sgd, num_microbatches=num_microbatches) as pipeline,
    ):
        pipeline.step(x, y)


def test_the_ways_that_the_error_names_work():
    x, y = classes((1, 5))
    counting = CallableLoss(ignoring, num_targets=lambda target: (target != -100).sum())
    for given, plain in ((counting, ignoring), (CallableLoss(adding, reduction="sum"), adding)):
        with flat_pipeline(layers(), given, optimizer=sgd, num_microbatches=8) as pipeline:
            found = pipeline.step(x, y).loss
            held_out = pipeline.evaluate([(x, y)], 3)["loss"]
        assert found == pytest.approx(plain(layers()(x), y).item(), rel=1e-5)
        assert held_out == held_out
    with flat_pipeline(
        layers(), CallableLoss(comparing, reduction="mean"), optimizer=sgd, num_microbatches=4
    ) as pipeline:
        parts = [comparing(layers()(part), None).item() for part in x.split(2)]
        assert pipeline.step(x, y).loss == pytest.approx(sum(parts) / 4, rel=1e-5)


def test_means_are_believed_and_nothing_is_left_behind():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, hidden, target):
            self.calls += 1
            return functional.l1_loss(hidden, target) * 2

    loss = Counting()
    with flat_pipeline(layers(1), loss, optimizer=sgd, num_microbatches=4) as pipeline:
        pipeline.step(torch.randn(8, 6), torch.randn(8, 1))
    assert loss.calls == 4


@pytest.mark.parametrize("draw", [lambda: torch.rand(()), random.random])
def test_a_loss_that_draws_is_believed(draw):
    def drawing(hidden, target):
        return functional.mse_loss(hidden, target) * draw()

    with flat_pipeline(layers(1), drawing, optimizer=sgd, num_microbatches=4) as pipeline:
        assert pipeline.step(torch.randn(8, 6), torch.randn(8, 1)).loss > 0


class Weighted(nn.Module):
    """A loss with a weight of its own, as for uncertainty."""

    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.zeros(()))

    def forward(self, hidden, target):
        return functional.mse_loss(hidden, target) * torch.exp(-self.s) + self.s


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_loss_with_weights_is_trained(schedule):
    torch.manual_seed(5)
    x, y = torch.randn(8, 6), torch.randn(8, 1)
    loss, net, plain = Weighted(), layers(1), Weighted()
    with flat_pipeline(net, loss, optimizer=sgd, num_microbatches=4, schedule=schedule) as pipeline:
        found = [pipeline.step(x, y).loss for _ in range(3)]
        state = pipeline.state_dict()
        held_out = pipeline.evaluate([(x, y)])["loss"]
    optimizer = sgd([*net.parameters(), *plain.parameters()])
    for number in found:
        value = plain(net(x), y)
        assert number == pytest.approx(value.item(), rel=1e-5)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert held_out == pytest.approx(plain(net(x), y).item(), rel=1e-5)
    torch.testing.assert_close(state.pop("loss.s"), plain.s.detach())
    torch.testing.assert_close(state, dict(net.state_dict()))
    assert loss.s.item() == pytest.approx(plain.s.item(), rel=1e-5)  # the caller's own module shows it


def test_a_loss_with_weights_equals_the_reference_in_every_version():
    torch.manual_seed(5)
    x, y = torch.randn(8, 6), torch.randn(8, 1)
    chain = Chain.from_modules(layers(1), Weighted())
    assert len(chain) == 3
    with flat_pipeline(chain, optimizer=sgd, num_microbatches=4, schedule="pipedream") as pipeline:
        results = list(pipeline.train([(x, y)] * 2))
        state, program = pipeline.state_dict(), pipeline.programs.training(2, 0)
    reference = Reference(chain, sgd)
    microbatches = [{"input": a, "target": b} for _ in range(2) for a, b in zip(x.split(2), y.split(2), strict=True)]
    expected = reference.train_asynchronous(microbatches, [program.weights[0]], 4)
    assert [item.parts for item in results] == expected.batch_parts(4)
    for name, tensor in reference.parameters().items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: CallableLoss(partial(functional.mse_loss, reduction="none")), ModelError, "reduction='none'"),
        (lambda: CallableLoss(nn.MSELoss(), reduction="sum"), ModelError, "the loss itself has reduction='mean'"),
        (lambda: CallableLoss(adding, reduction="none"), ModelError, "reduction is 'none'; choose mean or sum"),
        (lambda: CallableLoss(adding, reduction="sum", num_targets=len), ModelError, "leave num_targets out"),
        (lambda: CallableLoss(adding, parts=("a", "b")), ModelError, "gives one number, and parts names 2"),
        (lambda: Chain.from_modules(layers(), nn.MSELoss), ConfigError, "is the class MSELoss"),
        (lambda: Chain.from_modules(layers(), 3), ConfigError, "modules need a loss, and got int"),
        (lambda: a_chain(functional.mse_loss), ModelError, "the loss of a chain is of type function"),
        (lambda: a_chain(CallableLoss(Weighted())), ModelError, "the loss has weights to train"),
    ],
)
def test_what_is_no_loss_is_told(make, error, text):
    with pytest.raises(error, match=text):
        make()


def a_chain(loss):
    return Chain((Block("a", lambda: nn.Linear(2, 2), ("input",), ("hidden",)),), ("input", "target"), loss)


def test_a_weight_for_each_sample_is_told():
    loss = partial(functional.mse_loss, weight=torch.rand(8, 1))
    with (
        pytest.raises(ModelError, match=r"weight of shape \(8, 1\), a row for each sample"),
        flat_pipeline(layers(1), loss, optimizer=sgd, num_microbatches=8) as pipeline,
    ):
        pipeline.step(torch.randn(8, 6), torch.rand(8, 1))


def weighted(hidden, target):
    return functional.cross_entropy(hidden, target, weight=WEIGHT)


class Tempered(nn.Module):
    """A learned loss that leaves targets out."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, hidden, target):
        return functional.cross_entropy(hidden / self.temperature, target)


def root(hidden, target):
    return functional.mse_loss(hidden.float(), target).sqrt()


class Owner:
    """Has a loss, and what cannot be copied."""

    def __init__(self):
        self.lock = threading.Lock()

    def loss(self, hidden, target):
        return functional.mse_loss(hidden, target, reduction="sum")


def test_samples_that_only_differ_between_microbatches_are_compared_too():
    x, _ = classes()
    in_order = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    late = torch.tensor([0, 1, 2, 3, 4, 0, -100, -100])
    cases = [(weighted, layers(), x, in_order), (ignoring, layers(), x, late), (Tempered(), layers(), x, late)]
    torch.manual_seed(0)
    wide = torch.randn(8, 6) * torch.arange(1, 9).unsqueeze(1) ** 2
    cases.append((root, layers(1).bfloat16(), wide.bfloat16(), torch.randn(8, 1)))
    cases.append((Owner().loss, layers(1), x, torch.randn(8, 1)))
    for loss, net, given, target in cases:
        with (
            pytest.raises(ModelError, match="no mean over samples"),
            flat_pipeline(net, loss, optimizer=sgd, num_microbatches=4) as pipeline,
        ):
            pipeline.step(given, target)


def test_what_changes_its_target_is_tried_on_copies():
    def clamping(hidden, target):
        target.clamp_(min=0.0)
        return functional.mse_loss(hidden, target)

    torch.manual_seed(2)
    x, y = torch.randn(8, 6), torch.randn(8, 1)
    for size in (1, 4):
        target = y.clone()
        with flat_pipeline(layers(1), clamping, optimizer=sgd, num_microbatches=size) as pipeline:
            found = pipeline.step(x, target).loss
        assert found == pytest.approx(functional.mse_loss(layers(1)(x), y.clamp(min=0.0)).item(), rel=1e-5)
        assert torch.equal(target, y.clamp(min=0.0))


class Turned(nn.Linear):
    """Puts time first."""

    def forward(self, x):
        return super().forward(x).transpose(0, 1)


@pytest.mark.parametrize("length", [4, 6])
def test_outputs_in_which_time_comes_first_are_believed(length):
    def turned(hidden, target):
        return functional.cross_entropy(hidden.transpose(0, 1).flatten(0, 1), target.flatten())

    torch.manual_seed(2)
    x, y = torch.randn(8, length, 6), torch.randint(0, CLASSES, (8, length))
    for size in (1, 4):
        with flat_pipeline([Turned(6, CLASSES)], turned, optimizer=sgd, num_microbatches=size) as pipeline:
            assert pipeline.step(x, y).loss > 0


def test_flattened_outputs_are_tried():
    def flat(hidden, target):
        return functional.cross_entropy(hidden, target.flatten(), ignore_index=0)

    torch.manual_seed(2)
    y = torch.randint(0, CLASSES, (8, 3))
    with (
        pytest.raises(ModelError, match="no mean over samples"),
        flat_pipeline([nn.Linear(6, CLASSES), nn.Flatten(0, 1)], flat, optimizer=sgd, num_microbatches=4) as pipeline,
    ):
        pipeline.step(torch.randn(8, 3, 6), y)


def test_what_a_loss_reads_of_all_samples_is_not_cut():
    def nearest(hidden, target, prototypes):
        return functional.cross_entropy(hidden @ prototypes.T, target)

    torch.manual_seed(2)
    x, y, prototypes = torch.randn(8, 6), torch.randint(0, 4, (8,)), torch.randn(4, CLASSES)
    loss = CallableLoss(nearest, ("hidden", "target", "prototypes"))
    fields = ("input", "target", "prototypes")
    found = []
    for size in (1, 2, 4):
        chain = Chain.from_modules(layers(), loss, fields=fields, whole_fields=("prototypes",))
        with flat_pipeline(chain, optimizer=sgd, num_microbatches=size) as pipeline:
            found.append(pipeline.step(input=x, target=y, prototypes=prototypes).loss)
    assert found == pytest.approx([nearest(layers()(x), y, prototypes).item()] * 3, rel=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_class_weights_that_come_with_the_batch(size):
    loss = CallableLoss(functional.cross_entropy, ("hidden", "target", "weight"))
    chain = Chain.from_modules(layers(), loss, fields=("input", "target", "weight"), whole_fields=("weight",))
    x, y = classes(())
    with flat_pipeline(chain, optimizer=sgd, num_microbatches=size) as pipeline:
        if size == 1:
            found = pipeline.step(input=x, target=y, weight=WEIGHT).loss
            assert found == functional.cross_entropy(layers()(x), y, WEIGHT).item()
        else:
            with pytest.raises(ModelError, match="no mean over samples"):
                pipeline.step(input=x, target=y, weight=WEIGHT)


def test_shapes_that_would_be_broadcast_are_told():
    x, y = torch.randn(8, 6), torch.randn(8)
    with (
        pytest.raises(ModelError, match=r"an output of shape \(2, 1\) with a target of shape \(2,\)"),
        flat_pipeline(layers(1), functional.mse_loss, optimizer=sgd, num_microbatches=4) as pipeline,
    ):
        pipeline.step(x, y)


def test_a_loss_that_computes_with_the_modules_that_were_given_is_told():
    net = layers(1)

    def regularised(hidden, target):
        return functional.mse_loss(hidden, target) + sum(item.square().sum() for item in net.parameters())

    x, y = torch.randn(8, 6), torch.randn(8, 1)
    with (
        pytest.raises(ConfigError, match=r"'0.weight' of the modules that were given got a gradient"),
        flat_pipeline(net, regularised, optimizer=sgd, num_microbatches=4) as pipeline,
    ):
        pipeline.step(x, y)


def test_training_the_given_modules_beside_is_no_matter():
    net, x, y = layers(1), torch.randn(8, 6), torch.randn(8, 1)
    optimizer = sgd(net.parameters())
    with flat_pipeline(net, functional.mse_loss, optimizer=sgd, num_microbatches=1) as pipeline:
        for _ in range(3):
            value = functional.mse_loss(net(x), y)
            assert pipeline.step(x, y).loss == value.item()
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
