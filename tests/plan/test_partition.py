from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpipe.errors import PlanError
from vpipe.plan.partition import Partition, check_partition


def all_cuts(num_blocks: int, num_stages: int) -> list[list[int]]:
    """Every way to cut: the oracle."""
    ends = itertools.combinations(range(1, num_blocks), num_stages - 1)
    return [[b - a for a, b in itertools.pairwise([0, *cut, num_blocks])] for cut in ends]


def heaviest(weights: list[float], partition: Sequence[int]) -> float:
    ends = [0, *itertools.accumulate(partition)]
    return max(sum(weights[a:b]) for a, b in itertools.pairwise(ends))


@pytest.mark.parametrize(
    ("num_blocks", "num_stages", "expected"),
    [(49, 4, [13, 12, 12, 12]), (49, 2, [25, 24]), (8, 4, [2, 2, 2, 2]), (3, 3, [1, 1, 1]), (5, 1, [5])],
)
def test_uniform(num_blocks: int, num_stages: int, expected: list[int]) -> None:
    assert list(Partition.uniform(num_blocks, num_stages)) == expected


@pytest.mark.parametrize(
    ("weights", "num_stages", "expected"),
    [
        ([1, 1, 1, 1], 2, [2, 2]),
        ([5, 1, 1, 1, 1, 1], 2, [1, 5]),
        ([1, 1, 1, 1, 1, 5], 2, [5, 1]),
        ([9, 1, 1], 3, [1, 1, 1]),
        ([0, 0, 0], 2, [2, 1]),
        ([0.1, 0.2, 0.3], 2, [2, 1]),
        ([2.0, 3.0], 1, [2]),
    ],
)
def test_by_weight(weights: list[float], num_stages: int, expected: list[int]) -> None:
    assert list(Partition.by_weight(weights, num_stages)) == expected


@given(st.lists(st.integers(0, 30), min_size=1, max_size=9), st.integers(1, 9))
def test_by_weight_is_as_good_as_brute_force(weights: list[int], num_stages: int) -> None:
    num_stages = min(num_stages, len(weights))
    partition = Partition.by_weight(weights, num_stages)
    assert check_partition(partition, len(weights), num_stages) == []
    assert heaviest(weights, partition) == min(heaviest(weights, cut) for cut in all_cuts(len(weights), num_stages))


@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=7), st.integers(1, 7))
def test_by_weight_holds_for_any_float(weights: list[float], num_stages: int) -> None:
    num_stages = min(num_stages, len(weights))
    partition = Partition.by_weight(weights, num_stages)
    assert check_partition(partition, len(weights), num_stages) == []
    best = min(heaviest(weights, cut) for cut in all_cuts(len(weights), num_stages))
    assert heaviest(weights, partition) == pytest.approx(best, rel=1e-12)


def test_by_weight_of_a_deep_model_on_many_stages() -> None:
    weights = [(block * 7919) % 101 + 0.5 for block in range(400)]
    partition = Partition.by_weight(weights, 64)
    assert len(partition) == 64
    assert heaviest(weights, partition) < 1.35 * sum(weights) / 64


@pytest.mark.parametrize(
    ("weights", "num_stages", "message"),
    [
        ([1, 1], 3, "cannot cut 2 blocks into 3 stages; use at most 2 stages"),
        ([1, 1], 0, "cannot cut into 0 stages; use at least 1"),
        ([1, -2], 2, "the weight of block 1 is -2; a weight is a finite number of at least 0"),
        ([float("nan"), 1], 2, "the weight of block 0 is nan; a weight is a finite number of at least 0"),
    ],
)
def test_by_weight_refuses(weights: list[float], num_stages: int, message: str) -> None:
    with pytest.raises(PlanError) as error:
        Partition.by_weight(weights, num_stages)
    assert str(error.value) == message


def test_uniform_refuses_more_stages_than_blocks() -> None:
    with pytest.raises(PlanError, match="cannot cut 3 blocks into 4 stages; use at most 3 stages"):
        Partition.uniform(3, 4)


@pytest.mark.parametrize(
    ("partition", "num_blocks", "num_stages", "reasons"),
    [
        ([12, 13, 13, 11], 49, 4, []),
        ([12, 13, 13, 12], 49, 4, ["has 50 blocks in all, and the model has 49; take away 1"]),
        ([12, 13, 13, 9], 49, 4, ["has 47 blocks in all, and the model has 49; add 2"]),
        ([25, 24], 49, 4, ["has 2 entries for 4 stages; give one block count per stage"]),
        ([25, 0, 24], 49, 3, ["gives stage 1 0 blocks; a stage has at least 1"]),
        ([1, 1, 1], 2, 3, [
            "3 stages are more than the model's 2 blocks; use at most 2 stages",
            "has 3 blocks in all, and the model has 2; take away 1",
        ]),
    ],
)  # fmt: skip
def test_check_partition(partition: list[int], num_blocks: int, num_stages: int, reasons: list[str]) -> None:
    assert check_partition(partition, num_blocks, num_stages) == reasons


def test_validate_partition_names_everything() -> None:
    Partition.checked([12, 13, 13, 11], 49, 4)
    with pytest.raises(PlanError) as error:
        Partition.checked([12, 0, 13], 49, 4)
    assert str(error.value) == (
        "partition [12, 0, 13] has 3 entries for 4 stages; give one block count per stage; it gives stage 1 0 "
        "blocks; a stage has at least 1; it has 25 blocks in all, and the model has 49; add 24"
    )


@given(st.lists(st.integers(1, 6), min_size=1, max_size=7))
def test_stages_and_blocks_belong_together(sizes: list[int]) -> None:
    partition = Partition(sizes)
    assert (partition.num_stages, partition.num_blocks) == (len(sizes), sum(sizes))
    blocks = [block for stage in range(partition.num_stages) for block in partition.range_of(stage)]
    assert blocks == list(range(partition.num_blocks))
    for stage, start in enumerate(partition.starts):
        assert len(partition.range_of(stage)) == partition[stage]
        assert partition.range_of(stage)[0] == start
        assert all(partition.stage_of(block) == stage for block in partition.range_of(stage))
    assert partition.cuts == partition.starts[1:]
    assert Partition.between([*partition.starts, partition.num_blocks]) == partition


def test_a_block_that_is_not_there_has_no_stage() -> None:
    with pytest.raises(IndexError, match="block 5 is not one of the 5"):
        Partition([2, 3]).stage_of(5)
