"""Weight versions that are moved to host memory: the same path of the weights, in the memory of two sets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vpipe.errors import ExecutionError, ScheduleError
from vpipe.runtime.memory.host_link import ThreadLink
from vpipe.runtime.memory.host_memory import MappedMemory
from vpipe.runtime.weights.movable_versions import MovableVersions
from vpipe.runtime.weights.weights import WeightVersions
from vpipe.schedule.action import Kind
from vpipe.schedule.passes.version_moves import insert_version_moves
from vpipe.schedule.registry import build_schedule
from vpipe.schedule.schedule import Schedule
from vpipe.schedule.weights import weight_usage

NAMES = ["0.weight", "0.bias", "1.weight", "1.bias"]
SET = 4 * (5 * 7 + 5 + 5 * 5 + 5)
PADDED = 4 * (48 + 16 + 32 + 16)
"""Each parameter begins at a multiple of 64 bytes."""


def modules() -> list[nn.Module]:
    torch.manual_seed(4)
    second = nn.Linear(5, 5)
    second.weight.data = torch.randn(5, 5).t()  # not contiguous
    return [nn.Sequential(nn.Linear(7, 5), nn.Tanh()), second, nn.BatchNorm1d(5, affine=False)]


def sgd(named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(named, lr=0.01, momentum=0.9)


@pytest.fixture
def link(tmp_path: Path) -> Iterator[ThreadLink]:
    made = ThreadLink(MappedMemory(tmp_path))
    yield made
    made.close()


def movable(link: ThreadLink) -> MovableVersions:
    weights = MovableVersions(modules(), NAMES, sgd)
    weights.link = link
    return weights


def replay(weights: WeightVersions, schedule: Schedule, stage: int = 0) -> tuple[list[Tensor], int]:
    """Do what one stage's order says; return the weights after each update, and the most bytes besides the newest."""
    usage = weight_usage(schedule)[stage]
    weights.start(usage.version_of)
    graphs: dict[int, Tensor] = {}
    path, most = [], 0
    for action in schedule.stage_order(stage):
        serial = action.microbatch
        version = usage.version_of[serial]
        if action.kind is Kind.F:
            value = torch.randn(3, 7, generator=torch.Generator().manual_seed(serial))
            for module in weights.modules(version):
                value = module(value)
            graphs[serial] = value.square().sum()
        elif action.kind is Kind.B:
            weights.accumulate(version, lambda k=serial: graphs.pop(k).backward())  # type: ignore[misc]
        elif action.kind is Kind.STEP:
            weights.step()
            path.append(torch.cat([item.detach().flatten() for item in weights.parameters]))
        elif isinstance(weights, MovableVersions):
            (weights.offload if action.kind is Kind.OFFLOAD_V else weights.fetch)(version)
        most = max(most, weights.older_bytes())
    return path, most


def schedules(**options: object) -> tuple[Schedule, Schedule]:
    plain = build_schedule("pipedream", 5, 12, **options)
    return plain, insert_version_moves(plain, range(5))


@pytest.mark.parametrize("stage", range(5))
@pytest.mark.parametrize("options", [{}, {"depths": [7, 6, 5, 4, 3]}, {"vertical_sync": True}])
def test_the_path_is_that_of_versions_that_stay(link: ThreadLink, stage: int, options: dict[str, object]) -> None:
    plain, moving = schedules(**options)
    expected, kept = replay(WeightVersions(modules(), NAMES, sgd), plain, stage)
    weights, usage = movable(link), weight_usage(moving)[stage]
    found, most = replay(weights, moving, stage)
    assert all(map(torch.equal, found, expected))
    assert len(found) == len(expected) == 12
    assert kept == (usage.num_versions - 1) * SET
    assert most == (usage.num_on_device - 1) * PADDED
    assert weights.num_sets <= usage.num_versions
    moved = sum(action.kind is Kind.OFFLOAD_V for action in moving.stage_order(stage))
    assert link.bytes_offloaded == link.bytes_fetched == moved * PADDED


def test_a_program_goes_on_where_the_last_one_ended(link: ThreadLink) -> None:
    plain, moving = schedules()
    kept, weights = WeightVersions(modules(), NAMES, sgd), movable(link)
    for _ in range(3):
        assert all(map(torch.equal, replay(weights, moving)[0], replay(kept, plain)[0]))
        assert weights.older_bytes() == 0
    for old, new in zip(kept.newest.buffers(), weights.newest.buffers(), strict=True):
        assert torch.equal(old, new)
    assert weights.num_sets == kept.num_sets == 5
    assert link._memory.num_bytes == 4 * 4096  # type: ignore[attr-defined]  # regions are used again


def test_every_change_of_memory_is_told(link: ThreadLink) -> None:
    weights = movable(link)
    told: list[tuple[int, bool]] = []
    weights.resized = lambda num_bytes, *, by_link=False: told.append((num_bytes, by_link))
    replay(weights, schedules()[1])
    assert sum(num_bytes for num_bytes, _ in told) == weights.older_bytes() == 0
    assert sum(by_link for _, by_link in told) == link.bytes_fetched // PADDED > 0
    assert {abs(num_bytes) for num_bytes, _ in told} == {PADDED}


def test_weights_of_plain_versions_are_told_too() -> None:
    weights = WeightVersions(modules(), NAMES, sgd)
    told: list[int] = []
    weights.resized = lambda num_bytes, *, by_link=False: told.append(num_bytes)
    replay(weights, schedules()[0])
    assert sum(told) == weights.older_bytes() == 4 * SET


def away(link: ThreadLink) -> MovableVersions:
    """Return weights whose first version is in host memory."""
    weights = movable(link)
    weights.start([0, 0])
    weights.offload(0)
    weights.step()
    return weights


def test_what_nobody_sent_for_is_not_used(link: ThreadLink) -> None:
    with pytest.raises(ScheduleError, match="weights that were moved to host memory and not fetched; put a FETCH_V"):
        away(link).modules(0)
    weights = away(link)
    assert weights.older_bytes() == 0
    weights.fetch(0)
    assert torch.equal(weights.modules(0)[1].weight, modules()[1].weight)  # type: ignore[arg-type]


class Full(MappedMemory):
    def take(self, num_bytes: int) -> Tensor:
        raise ExecutionError("no room")


def test_no_update_without_a_copy(tmp_path: Path) -> None:
    with pytest.raises(ExecutionError, match="no room"):
        away(ThreadLink(Full(tmp_path)))


def test_a_stage_without_parameters_moves_nothing(link: ThreadLink) -> None:
    weights = MovableVersions([nn.Tanh()], [], torch.optim.SGD)
    weights.link = link
    weights.start([0, 0])
    weights.offload(0)
    weights.step()
    weights.fetch(0)
    assert weights.modules(0)[0](torch.zeros(1)).item() == 0
    assert link.bytes_offloaded == 0


def test_parameters_that_share_memory_with_others_get_their_own(link: ThreadLink) -> None:
    shared = torch.randn(2, 3, 3)
    parts = [nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)]
    for part, value in zip(parts, shared, strict=True):
        part.weight.data = value
    weights = MovableVersions(parts, ["0", "1"], sgd)
    assert all(torch.equal(part.weight, value) for part, value in zip(parts, shared, strict=True))
    weights.parameters[0].data.zero_()
    assert parts[0].weight.sum().item() == 0 != shared[0].sum().item()
