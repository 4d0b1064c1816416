"""A message is what was waited for, or an error that says what it is instead."""

from __future__ import annotations

import pytest
import torch

from vpipe.errors import TransportError
from vpipe.model.chain import ValueSpec
from vpipe.runtime.comm.message import ALIGNMENT, GPU_ALIGNMENT, Message, MessageLayout

CPU = torch.device("cpu")
SPECS = (
    ValueSpec("hidden", (2, 3), torch.float32, True),
    ValueSpec("mask", (2, 5), torch.bool, False),
    ValueSpec("positions", (2,), torch.int64, False),
    ValueSpec("scale", (), torch.float64, True),
    ValueSpec("nothing", (0, 4), torch.float32, False),
    ValueSpec("half", (3,), torch.bfloat16, True),
)
VALUES = {
    "hidden": torch.randn(3, 2).T,  # not contiguous
    "mask": torch.rand(2, 5) < 0.5,
    "positions": torch.tensor([7, -1]),
    "scale": torch.tensor(0.1, dtype=torch.float64),
    "nothing": torch.empty(0, 4),
    "half": torch.randn(3).bfloat16(),
}


def packed(layout, serial=4, values=VALUES):
    message = Message(layout, CPU)
    message.buffer.fill_(255)
    message.pack(serial, values)
    return message


def received(message, layout):
    """Return a message of `layout` that got what `message` holds, as far as there is room."""
    other = Message(layout, CPU)
    size = min(other.buffer.numel(), message.buffer.numel())
    other.buffer[:size] = message.buffer[:size]
    return other


def test_values_of_every_type_come_back_without_copies():
    layout = MessageLayout(3, SPECS)
    message = packed(layout)
    found = message.unpack(4)
    assert list(found) == [spec.name for spec in SPECS]
    for name, value in VALUES.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    message.buffer.zero_()
    assert not found["hidden"].any()
    assert {found[name].data_ptr() % ALIGNMENT for name in VALUES if found[name].numel()} == {0}


def test_missing_values_are_missing_and_zero_for_those_who_cannot_look():
    layout = MessageLayout(3, SPECS)
    message = packed(layout, values={"mask": VALUES["mask"]})
    assert list(message.unpack(4)) == ["mask"]
    assert torch.equal(message.values["mask"], VALUES["mask"])
    assert not message.values["hidden"].any()


def test_memory_that_only_tensor_operations_reach_tells_the_same():
    layout = MessageLayout(3, SPECS)
    message = Message(layout, CPU)
    message._memory = None  # as on a GPU
    message.pack(4, {"mask": VALUES["mask"]})
    assert list(message.unpack(4)) == list(received(message, layout).unpack(4)) == ["mask"]
    with pytest.raises(TransportError, match=r"\(3, 5, \d+\) but received \(3, 4, \d+\)"):
        message.unpack(5)


def test_values_lie_on_a_gpu_as_its_allocator_would_place_them():
    views = MessageLayout(3, SPECS, torch.device("cuda")).views(torch.empty(1 << 14, dtype=torch.uint8))
    assert {view.storage_offset() * view.element_size() % GPU_ALIGNMENT for view in views.values()} == {0}


def test_nothing_to_say_needs_no_message():
    assert MessageLayout(3, ()).num_bytes == 0


@pytest.mark.parametrize(
    "other",
    [
        MessageLayout(4, SPECS),
        MessageLayout(3, SPECS[:-1]),
        MessageLayout(3, [ValueSpec("other", (2, 3), torch.float32, True), *SPECS[1:]]),
        MessageLayout(3, [ValueSpec("hidden", (3, 2), torch.float32, True), *SPECS[1:]]),
        MessageLayout(3, [ValueSpec("hidden", (2, 3), torch.int32, True), *SPECS[1:]]),
    ],
)
def test_another_channel_or_layout_is_refused(other):
    with pytest.raises(
        TransportError, match=r"expected message \(channel, serial, layout\) \(\d, 4, \d+\) but received"
    ):
        received(packed(MessageLayout(3, SPECS)), other).unpack(4)


def test_another_microbatch_is_refused():
    layout = MessageLayout(3, SPECS)
    with pytest.raises(TransportError, match=r"\(3, 5, \d+\) but received \(3, 4, \d+\); all ranks must run the same"):
        packed(layout).unpack(5)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (
            torch.zeros(2, 4),
            r"'hidden' was agreed as \(2, 3\) torch.float32 but is \(2, 4\) torch.float32; blocks must",
        ),
        (
            torch.zeros(2, 3, dtype=torch.float64),
            r"'hidden' was agreed as \(2, 3\) torch.float32 but is .* torch.float64",
        ),
        (torch.zeros(6), r"but is \(6,\) torch.float32"),
    ],
)
def test_values_of_another_shape_or_type_are_refused(wrong, text):
    with pytest.raises(TransportError, match=text):
        packed(MessageLayout(3, SPECS), values=VALUES | {"hidden": wrong})


def test_memory_is_free_when_nobody_refers_to_it():
    message = packed(MessageLayout(3, SPECS))
    assert message.is_free
    found = message.unpack(4)
    assert not message.is_free
    del found
    assert message.is_free


def test_a_view_keeps_the_memory():
    message = packed(MessageLayout(3, SPECS))
    view = message.unpack(4)["hidden"][0].view(3, 1)
    assert not message.is_free
    del view
    assert message.is_free


def test_what_autograd_saved_keeps_the_memory():
    message = packed(MessageLayout(3, SPECS))
    weight = torch.ones(2, 3, requires_grad=True)
    product = (weight * message.unpack(4)["hidden"]).sum()
    assert not message.is_free
    product.backward()
    del product
    assert message.is_free


def test_a_gradient_that_is_what_arrived_keeps_the_memory():
    message = packed(MessageLayout(3, SPECS))
    weight = torch.ones(2, 3, requires_grad=True)
    torch.autograd.backward([weight.view_as(weight)], [message.unpack(4)["hidden"]])
    assert weight.grad is not None
    if weight.grad.untyped_storage().data_ptr() == message.buffer.untyped_storage().data_ptr():
        assert not message.is_free
    expected = weight.grad.clone()
    if message.is_free:
        message.buffer.zero_()
    assert torch.equal(weight.grad, expected)


def test_memory_is_aligned_as_torch_aligns():
    assert Message(MessageLayout(3, SPECS), CPU).buffer.data_ptr() % ALIGNMENT == 0
    assert torch.empty(3).data_ptr() % ALIGNMENT == 0


ODD = {
    "transposed": lambda: torch.randn(5, 4, 3).transpose(0, 2),
    "channels last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "a part": lambda: torch.randn(4, 9)[:, 2:6],
    "every other": lambda: torch.randn(8, 3)[::2],
    "one row, channels last": lambda: torch.randn(3, 1, 4, 5).contiguous(memory_format=torch.channels_last),
    "one pixel": lambda: torch.randn(3, 5, 2, 2).contiguous(memory_format=torch.channels_last)[:, :, :1, :1].clone(),
    "expanded": lambda: torch.randn(4, 1, 3).expand(4, 5, 3),
    "expanded, transposed": lambda: torch.randn(3, 4).T.unsqueeze(1).expand(4, 2, 3),
    "one number": lambda: torch.randn(()).expand(2, 3),
    "empty": lambda: torch.empty(0, 3).T,
    "half": lambda: torch.randn(4, 6).bfloat16().T,
}


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_values_lie_as_they_did(name, on_gpu):
    value = ODD[name]()
    specs = [ValueSpec("odd", tuple(value.shape), value.dtype, True), ValueSpec("even", (3,), torch.float32, True)]
    layout = MessageLayout(3, specs)
    message = Message(layout, CPU)
    message._memory = None if on_gpu else message._memory
    message.pack(4, {"odd": value, "even": torch.arange(3.0)})
    found = message.unpack(4)
    assert torch.equal(found["odd"], value)
    assert found["odd"].stride() == value.stride() or not value.numel()
    assert found["even"].tolist() == [0.0, 1.0, 2.0]
    assert list(received(message, layout).unpack(4)) == ["odd", "even"]
    message.pack(5, {"odd": torch.ones(value.shape, dtype=value.dtype)})
    assert message.unpack(5)["odd"].is_contiguous()


def test_each_value_counts_its_own_changes():
    found = packed(MessageLayout(3, SPECS)).unpack(4)
    found["hidden"].mul_(2)
    assert [found[name]._version for name in ("hidden", "mask", "positions")] == [1, 0, 0]


def test_memory_serves_another_layout():
    large, small = MessageLayout(3, SPECS), MessageLayout(3, SPECS[:1])
    message = packed(large)
    other = message.turned_into(small)
    assert other.capacity == large.num_bytes
    assert other.is_free
    other.pack(6, VALUES)
    assert torch.equal(other.unpack(6)["hidden"], VALUES["hidden"])
    assert packed(large, 7).turned_into(large).unpack(7).keys() == VALUES.keys()


def test_a_part_does_not_bring_the_whole():
    value = torch.randn(16, 2000, 64)[:, -1]
    layout = MessageLayout(3, [ValueSpec("part", (16, 64), torch.float32, True)])
    message = Message(layout, CPU)
    message.pack(1, {"part": value})
    found = message.unpack(1)["part"]
    assert torch.equal(found, value)
    assert not found.is_contiguous()
    assert found.untyped_storage().nbytes() < 2 * 16 * 64 * 4
