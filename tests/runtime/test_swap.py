"""Parcels: what goes into them, what stays, and that tensors come out as they went in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vpipe.errors import ModelError, ScheduleError
from vpipe.runtime.memory import swap
from vpipe.runtime.memory.swap import Parcel, Swapped


@pytest.fixture(autouse=True)
def _move_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "SMALL_BYTES", 0)


def away_and_back(parcels: list[Parcel]) -> None:
    """Copy what a link would, to other memory."""
    for parcel in parcels:
        assert parcel.device is not None
        parcel.host = parcel.device.clone()
        parcel.device = None
    for parcel in parcels:
        assert parcel.host is not None
        parcel.device = parcel.host.clone()


def block(value: Tensor) -> Tensor:
    left, right = value.chunk(2, dim=1)
    return (left.t() * right.t().exp()).tanh()


def run(swapped: Swapped | None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    leaf = torch.randn(6, 8, requires_grad=True)
    value = leaf * 3
    return leaf, block(value) if swapped is None else swapped.run(block, value)


def test_gradients_have_the_same_bits_wherever_the_memory_was() -> None:
    leaf, output = run(None)
    output.square().sum().backward()
    swapped = Swapped()
    other, moved = run(swapped)
    parcels = swapped.pack_up(())
    # The two factors and the result of tanh; the halves of one tensor share a storage, which moves once.
    assert sorted(parcel.num_bytes for parcel in parcels) == sorted([6 * 8 * 4, 6 * 4 * 4, 6 * 4 * 4])
    away_and_back(parcels)
    del parcels
    moved.square().sum().backward()
    assert leaf.grad is not None
    assert other.grad is not None
    assert torch.equal(leaf.grad, other.grad)


def test_nothing_is_different_until_it_is_packed_up() -> None:
    swapped = Swapped()
    leaf, output = run(swapped)
    output.sum().backward()
    assert leaf.grad is not None
    assert list(swapped.tensors()) == []
    assert swapped.pack_up(()) == []


def test_what_others_hold_stays_and_so_does_what_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = Swapped()
    run(swapped)
    places = {tensor.untyped_storage().data_ptr() for tensor in swapped.tensors()}
    assert swapped.pack_up(places) == []
    _, output = run(swapped)
    assert len(swapped.pack_up(places)) > 0
    monkeypatch.setattr(swap, "SMALL_BYTES", 6 * 4 * 4)
    large = Swapped()
    _, another = run(large)
    assert [parcel.num_bytes for parcel in large.pack_up(())] == [6 * 8 * 4]
    del output, another


def test_parcels_come_back_in_the_order_of_the_backward_as_long_as_they_are_needed() -> None:
    swapped = Swapped()
    _, output = run(swapped)
    sent = swapped.pack_up(())
    assert swapped.parcels() == sent[::-1]
    del sent, output
    assert swapped.parcels() == []


def test_types_and_layouts_survive() -> None:
    values = [
        torch.arange(24.0, dtype=torch.float64).view(4, 6)[1:, ::2],
        torch.randn(3, 4).t(),
        torch.randn(2, 3).to(torch.bfloat16)[0],
        torch.randn(3).expand(2, 3),
        torch.tensor([True, False]),
        torch.randn(2, 2, dtype=torch.complex64),
    ]
    for value in values:
        kept = swap.Kept(value)
        parcel = Parcel(value.untyped_storage())
        kept.move_into(parcel)
        away_and_back([parcel])
        found = kept.take()
        assert torch.equal(found, value)
        assert (found.dtype, found.stride()) == (value.dtype, value.stride())
        assert found.storage_offset() == value.storage_offset()


def test_conjugates_are_left_where_they_are() -> None:
    swapped = Swapped()
    value = torch.randn(4, 4, dtype=torch.complex64, requires_grad=True)
    swapped.run(lambda tensor: tensor * tensor.conj(), value)
    assert all(not tensor.is_conj() for tensor in swapped.tensors())


def test_a_tensor_that_changed_since_it_was_saved_is_an_error() -> None:
    for packed in (False, True):
        swapped = Swapped()
        value = torch.randn(5, requires_grad=True) * 1
        output = swapped.run(lambda tensor: tensor.sin() * tensor, value)
        value.add_(1)
        with pytest.raises(ModelError, match=r"a tensor of shape \(5,\) that the backward needs was changed in place"):
            swapped.pack_up(()) if packed else output.sum().backward()


def test_a_backward_before_the_fetch_is_an_error() -> None:
    swapped = Swapped()
    _, output = run(swapped)
    for parcel in swapped.pack_up(()):
        parcel.device = None
    with pytest.raises(ScheduleError, match="moved to host memory and not fetched; put a FETCH before it"):
        output.sum().backward()


def test_modules_with_weights_get_their_gradients() -> None:
    found = []
    for packed in (False, True):
        torch.manual_seed(7)
        module = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2))
        weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        swapped = Swapped()
        output = swapped.run(module, torch.randn(3, 6))
        if packed:
            away_and_back(swapped.pack_up(weights))
        output.sum().backward()
        found.append([parameter.grad for parameter in module.parameters()])
    for first, second in zip(*found, strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)
