"""Clipping: the norm is right, and has the same bits on every partition."""

from __future__ import annotations

import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from vpipe.runtime.weights.clipping import (
    are_finite,
    clip_coefficient,
    global_norm,
    local_norm,
    scale_gradients,
    squared_norms,
)

SHAPES = [(40, 30), (30,), (7, 5, 3), (), (100_000,), (1, 1), (64, 64)]


def _gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * 10.0 ** (index - 3) for index, shape in enumerate(SHAPES)]


def test_squared_norms_are_summed_in_float64() -> None:
    squares = squared_norms([torch.full((10_000,), 0.1), torch.tensor([3.0, 4.0])])
    assert squares.dtype == torch.float64
    assert squares.tolist() == pytest.approx([10_000 * float(torch.tensor(0.1)) ** 2, 25.0], rel=1e-12)


def test_the_norm_of_a_large_gradient_makes_no_copy_of_it() -> None:
    large = torch.randn(300, 2000, generator=torch.Generator().manual_seed(1))
    with torch.profiler.profile(profile_memory=True) as watched:
        (square,) = squared_norms([large])
    allocated = [event.self_cpu_memory_usage for event in watched.events()]
    assert max(allocated) < large.nbytes / 4
    assert float(square) == pytest.approx(float(large.double().square().sum()), rel=1e-12)


def test_norm_agrees_with_torch() -> None:
    gradients = _gradients()
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = local_norm(gradients)
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(parameters, 1.5).item(), rel=1e-5)
    scale_gradients(gradients, clip_coefficient(norm, 1.5))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=0)
    assert local_norm(gradients) == pytest.approx(1.5, rel=1e-5)


def test_order_and_zeros_change_no_bit() -> None:
    gradients = _gradients()
    norm = local_norm(gradients)
    assert local_norm(gradients[::-1]) == norm
    assert global_norm(list(enumerate(gradients)), len(gradients)) == norm
    assert global_norm([(10 - index, item) for index, item in enumerate(gradients)], 200) == norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_found_and_the_others_stay(dtype: torch.dtype, bad: float) -> None:
    good = torch.randn(3, 4, dtype=torch.float64).t()
    gradient = torch.randn(300).to(dtype)
    sparse = torch.sparse_coo_tensor([[1, 1, 4]], torch.ones(3, 2), (6, 2))
    before = good.clone(), gradient.clone()
    assert are_finite([good, gradient, torch.empty(0), sparse])
    assert torch.equal(good, before[0])
    assert torch.equal(gradient, before[1])
    gradient[77] = bad
    assert not are_finite([good, gradient])
    assert not are_finite([torch.sparse_coo_tensor([[2]], torch.tensor([[1.0, bad]]), (6, 2))])
    assert are_finite([])


def test_coefficient() -> None:
    assert clip_coefficient(4.0, 1.0) == 1.0 / 4.000001
    assert clip_coefficient(0.5, 1.0) == 1.0
    assert clip_coefficient(0.0, 1.0) == 1.0
    assert clip_coefficient(math.inf, 1.0) == 0.0


def test_gradients_within_the_limit_are_not_touched() -> None:
    gradient = torch.ones(3)
    version = gradient._version
    scale_gradients([gradient], 1.0)
    assert gradient._version == version
    scale_gradients([gradient], 0.5)
    assert gradient.tolist() == [0.5] * 3


def test_no_gradients_at_all() -> None:
    assert local_norm([]) == 0.0
    assert global_norm([], 3) == 0.0
    scale_gradients([], 0.5)


def _clip_on_ranks(rank: int, folder: str, owners: list[list[int]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=len(owners), timeout=timedelta(seconds=60)
    )
    gradients = _gradients()
    mine = [(index, gradients[index]) for index in owners[rank]]
    norm = global_norm(mine, len(gradients), dist.group.WORLD)
    scale_gradients([item for _, item in mine], clip_coefficient(norm, 2.0))
    torch.save((norm, dict(mine)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("owners", [[[0, 1, 2], [3, 4, 5, 6]], [[6, 0], [], [1, 2, 3, 4, 5]]])
def test_every_partition_gives_the_bits_of_one_process(tmp_path: Path, owners: list[list[int]]) -> None:
    mp.spawn(_clip_on_ranks, (str(tmp_path), owners), len(owners))
    expected = _gradients()
    norm = local_norm(expected)
    scale_gradients(expected, clip_coefficient(norm, 2.0))
    clipped: dict[int, Tensor] = {}
    for rank in range(len(owners)):
        rank_norm, part = torch.load(tmp_path / f"{rank}.pt")
        assert rank_norm == norm
        clipped.update(part)
    assert all(torch.equal(clipped[index], expected[index]) for index in range(len(expected)))
