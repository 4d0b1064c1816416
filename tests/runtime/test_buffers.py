"""Buffers are reused, and never while a tensor stands on them."""

from __future__ import annotations

import torch

from vpipe.runtime.buffers import ALIGNMENT, BufferPool

CPU = torch.device("cpu")


def test_memory_is_reused_when_nobody_refers_to_it():
    pool = BufferPool(CPU)
    places = set()
    for _ in range(5):
        buffer = pool.take(1000)
        places.add(buffer.data_ptr())
        del buffer
    assert len(places) == 1
    assert pool.num_bytes == 1000


def test_memory_in_use_is_not_handed_out():
    pool = BufferPool(CPU)
    first, second = pool.take(64), pool.take(64)
    first.fill_(1)
    second.fill_(2)
    assert first.tolist() == [1] * 64
    assert pool.num_bytes == 128


def test_a_view_keeps_the_memory():
    pool = BufferPool(CPU)
    buffer = pool.take(64)
    place, view = buffer.data_ptr(), buffer[8:16].view(torch.float32).view(2, 1)
    del buffer
    assert pool.take(64).data_ptr() != place
    del view
    assert pool.take(64).data_ptr() == place


def test_what_autograd_saved_keeps_the_memory():
    pool = BufferPool(CPU)
    values = pool.take(16).view(torch.float32).fill_(3.0)
    place = values.data_ptr()
    weight = torch.ones(4, requires_grad=True)
    product = (weight * values).sum()
    del values
    pool.take(16).fill_(0)
    product.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0] * 4
    del product
    assert pool.take(16).data_ptr() == place


def test_sizes_do_not_mix_and_are_aligned_as_torch_aligns():
    pool = BufferPool(CPU)
    buffers = [pool.take(size) for size in (1, 63, 64, 65, 4096)]
    assert [buffer.numel() for buffer in buffers] == [1, 63, 64, 65, 4096]
    assert {buffer.data_ptr() % ALIGNMENT for buffer in buffers} == {0}
    assert torch.empty(3).data_ptr() % ALIGNMENT == 0


def test_other_devices_have_allocators_of_their_own():
    pool = BufferPool(torch.device("meta"))
    assert pool.take(10).device.type == "meta"
    assert pool.num_bytes == 0
