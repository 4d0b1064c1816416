"""Shares of microbatches that add up to the loss of the batch."""

import pytest
import torch
from torch import nn

from vpipe.errors import ModelError
from vpipe.model.loss import CallableLoss, sum_parts


@pytest.mark.parametrize("sizes", [(6,), (3, 3), (1, 2, 3)])
def test_shares_of_microbatches_add_up_to_the_mean_over_the_batch(sizes):
    loss = CallableLoss(nn.functional.cross_entropy)
    hidden, target = torch.randn(6, 4), torch.randint(0, 4, (6,))
    totals = loss.count({"target": target}, 6)
    shares = [
        loss({"hidden": h, "target": t}, totals, len(t))["loss"]
        for h, t in zip(hidden.split(sizes), target.split(sizes), strict=True)
    ]
    torch.testing.assert_close(sum(shares), nn.functional.cross_entropy(hidden, target))


def test_one_microbatch_gives_the_very_loss_of_the_function():
    hidden, target = torch.randn(5, 4), torch.randn(5, 4)
    share = CallableLoss(nn.functional.mse_loss)({"hidden": hidden, "target": target}, {"loss": 5.0}, 5)["loss"]
    assert torch.equal(share, nn.functional.mse_loss(hidden, target))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda hidden, target: hidden - target, r"returned a tensor of shape \(2, 3\); .*mean over the samples"),
        (lambda hidden, target: 0.5, "returned float; it must return a tensor with one number"),
    ],
)
def test_a_function_that_returns_no_mean_is_refused(function, message):
    tensors = {"hidden": torch.ones(2, 3), "target": torch.ones(2, 3)}
    with pytest.raises(ModelError, match=message):
        CallableLoss(function)(tensors, {"loss": 2.0}, 2)


def test_parts_are_added_in_their_order():
    parts = {"a": torch.tensor(1e8), "b": torch.tensor(-1e8), "c": torch.tensor(1.0)}
    assert sum_parts(parts) == 1
    assert sum_parts(list(parts.values())[::-1]) == 0
    with pytest.raises(ModelError, match="the loss returned no parts"):
        sum_parts({})
