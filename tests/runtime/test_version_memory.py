"""What the ledger says of weight versions that move: two sets are on the device, however many there are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flat_pipeline import flat_pipeline
from torch import nn

from vpipe.errors import MemoryLimitError, ScheduleError
from vpipe.runtime.comm.world import World
from vpipe.runtime.pipeline import Pipeline

WIDTH, BLOCKS, ROWS = 32, 3, 4
WEIGHTS = BLOCKS * (WIDTH * WIDTH + WIDTH) * 4


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with World.join(timeout_seconds=60, backend="gloo"):
        yield


def train(num_batches: int = 6, **options: Any) -> tuple[Pipeline, list[float]]:
    torch.manual_seed(3)
    made = flat_pipeline(
        [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(BLOCKS)],
        nn.functional.mse_loss,
        optimizer=lambda named: torch.optim.Adam(named, lr=0.01),
        schedule="pipedream",
        num_microbatches=4,
        **options,
    )
    torch.manual_seed(1)
    batch = torch.randn(4 * ROWS, WIDTH), torch.randn(4 * ROWS, WIDTH)
    return made, [result.loss for result in made.train([batch] * num_batches)]


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("vertical_sync", [False, True])
def test_two_sets_are_on_the_device(depth: int, vertical_sync: bool) -> None:
    # Looked at to the end: what the ledger saw last otherwise depends on how far the link was then.
    options: dict[str, Any] = {"depths": [depth], "vertical_sync": vertical_sync, "watch": "all"}
    kept, losses = train(**options)
    made, same = train(**options, swap_versions=True)
    assert same == losses
    assert kept.ledger.peak_by_kind["versions"] == depth * WEIGHTS
    assert made.ledger.peak_by_kind["versions"] == WEIGHTS
    # Without a second forward ahead of the last backward there is nothing that waits, or nothing to gain.
    assert (made.host_link is None) == (depth == 1)
    others = {
        kind: bytes_ for kind, bytes_ in kept.ledger.peak_by_kind.items() if kind not in ("versions", "workspace")
    }
    assert {kind: made.ledger.peak_by_kind[kind] for kind in others} == others
    assert made.ledger.now.by_kind["versions"] == 0 if depth > 1 else WEIGHTS


@pytest.mark.parametrize("policy", ["keep", "recompute", "swap"])
def test_activations_are_counted_as_ever(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpipe.runtime.memory.swap.SMALL_BYTES", 0)
    options = {
        "depths": [4],
        "watch": "all",
        "policies": [policy] * BLOCKS,
        "recompute_ahead": [0] if policy == "recompute" else [],
    }
    kept, losses = train(**options)
    made, same = train(**options, swap_versions=[0])
    assert same == losses
    assert made.ledger.peak_by_kind["versions"] == WEIGHTS
    assert made.ledger.peak_by_kind["activations"] == kept.ledger.peak_by_kind["activations"]
    assert made.ledger.now.by_kind["activations"] == 0


def test_a_limit_that_needs_it_is_kept() -> None:
    made, losses = train(depths=[5], swap_versions=True, watch="all")
    limit = made.ledger.peak.total
    assert train(depths=[5], swap_versions=True, limit=limit)[1] == losses
    with pytest.raises(MemoryLimitError, match="rank 0 held"):
        train(depths=[5], limit=limit)


def test_stages_that_are_not_there_are_told() -> None:
    with pytest.raises(ScheduleError, match="there is no stage 3 whose weight versions could be moved, only 0 to 0"):
        train(swap_versions=[3])
