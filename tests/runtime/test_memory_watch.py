"""What a pipeline enters into its ledger is what there is, counted here by hand and by watching every tensor made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from flat_pipeline import flat_pipeline
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vpipe.errors import ConfigError, MemoryLimitError
from vpipe.runtime import memory_watch
from vpipe.runtime.comm.world import World
from vpipe.runtime.hooks import Hooks
from vpipe.runtime.memory import swap
from vpipe.runtime.pipeline import Pipeline
from vpipe.runtime.stage.stage import Stage

WIDTH, ROWS, BLOCKS = 16, 8, 4
FLOAT = 4


class Block(nn.Module):
    """Saves its input, and the result of the tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, value: Tensor) -> Tensor:
        return self.inner(value).tanh().mul(2.0)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with World.join(timeout_seconds=60, backend="gloo"):
        yield


def pipeline(schedule: str = "gpipe", count: int = 4, **options: Any) -> Pipeline:
    torch.manual_seed(3)
    optimizer = options.pop("optimizer", lambda named: torch.optim.SGD(named, lr=0.1))
    return flat_pipeline(
        [Block() for _ in range(BLOCKS)],
        nn.functional.mse_loss,
        optimizer=optimizer,
        schedule=schedule,
        num_microbatches=count,
        **options,
    )


def batch(count: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(count * ROWS, WIDTH), torch.randn(count * ROWS, WIDTH)


def train(made: Pipeline, num_batches: int = 2) -> list[float]:
    return [result.loss for result in made.train([batch(made.programs.num_microbatches)] * num_batches)]


WEIGHTS = BLOCKS * (WIDTH * WIDTH + WIDTH) * FLOAT
VALUE = ROWS * WIDTH * FLOAT
"""Bytes of one value between blocks, for one microbatch."""
LOSS = 2 * VALUE
"""The difference that mean squares save, and nothing else but their inputs: the output and the target."""


def test_every_kind_is_counted() -> None:
    made = pipeline(optimizer=lambda named: torch.optim.SGD(named, lr=0.1, momentum=0.9))
    train(made)
    peaks = made.ledger.peak_by_kind
    assert {kind: peaks[kind] for kind in ("parameters", "gradients", "optimizer")} == dict.fromkeys(
        ("parameters", "gradients", "optimizer"), WEIGHTS
    )
    assert peaks["versions"] == peaks["buffers"] == 0
    # Of a block the tanh and its double, which the next one reads; of the first one's input, the batch owns it.
    assert peaks["activations"] == 4 * 2 * BLOCKS * VALUE
    assert made.ledger.now.by_kind == {**dict.fromkeys(peaks, 0), "parameters": WEIGHTS, "optimizer": WEIGHTS}


def test_older_weights_are_versions() -> None:
    made = pipeline("pipedream", depths=[2])
    train(made, 4)
    assert made.ledger.peak_by_kind["versions"] == 2 * WEIGHTS


def test_blocks_that_recompute_hold_their_input_alone() -> None:
    made = pipeline(recompute_ratio=1.0)
    train(made)
    assert made.ledger.peak_by_kind["activations"] == 4 * (BLOCKS - 1) * VALUE
    half = pipeline(policies=["keep", "recompute", "recompute", "keep"])
    train(half)
    # Blocks 0 and 3 keep two each, and the inputs of 2 and 3 are the outputs of those that recompute.
    assert half.ledger.peak_by_kind["activations"] == 4 * 6 * VALUE


def test_a_recomputation_ahead_holds_all_of_its_microbatch_again() -> None:
    made = pipeline(recompute_ratio=1.0, recompute_ahead=[0])
    train(made)
    assert made.ledger.peak_by_kind["activations"] == (3 * (BLOCKS - 1) + 2 * BLOCKS) * VALUE


def test_what_is_moved_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "SMALL_BYTES", 0)
    count = 8
    kept = pipeline(count=count)
    losses = train(kept)
    made = pipeline(count=count, policies=["swap"] * BLOCKS)
    assert train(made) == losses
    assert kept.ledger.peak_by_kind["activations"] == count * 2 * BLOCKS * VALUE
    assert made.ledger.peak_by_kind["activations"] <= 2 * 2 * BLOCKS * VALUE
    assert made.ledger.now.by_kind["activations"] == 0
    assert made.host_link is not None
    assert made.host_link.bytes_offloaded == made.host_link.bytes_fetched == 2 * count * 2 * BLOCKS * VALUE


@pytest.mark.parametrize(("mode", "watched"), [("first", 2), ("all", 5)])
def test_only_the_first_batches_are_watched_unless_asked(mode: Any, watched: int) -> None:
    made = pipeline(watch=mode)
    settled = []
    settle = made.ledger.settle
    made.ledger.settle = lambda action, workspace=0: (settled.append(action), settle(action, workspace))[1]  # type: ignore[method-assign,assignment]
    train(made, 5)
    assert settled.count("0B2") == watched


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "pipedream"])
def test_what_is_not_looked_at_closely_is_entered_as_it_was_seen(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[bool] = []
    forward = Stage.forward

    def watched_forward(self: Stage, *arguments: Any, **options: Any) -> dict[str, Tensor]:
        looks.append(arguments[-1])
        return forward(self, *arguments, **options)

    monkeypatch.setattr(Stage, "forward", watched_forward)
    seen: list[tuple[str, dict[str, int]]] = []

    def look(action: Any, start: int, end: int) -> None:
        name = str(action.kind) if schedule == "pipedream" else str(action)
        seen.append((name, dict(made.ledger.now.by_kind)))

    options: dict[str, Any] = {"depths": [2]} if schedule == "pipedream" else {}
    made = pipeline(schedule, watch="all", hooks=Hooks(record=look), policies=["keep", "recompute"] * 2, **options)
    steady = made.plan.num_batches_until_steady
    train(made, steady + 3)
    assert looks == [True] * (4 * steady) + [False] * 12
    per_batch = len(seen) // (steady + 3)
    if schedule == "pipedream":
        seen = seen[: -2 * 3]  # the drain
        close, later = seen[3 * (4 * steady - 4) : 3 * 4 * steady], seen[3 * 4 * steady : 3 * (4 * steady + 4)]
    else:
        close, later = seen[(steady - 1) * per_batch : steady * per_batch], seen[-per_batch:]
    assert close == later


def test_one_batch_of_many_is_looked_at_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_watch, "_LOOK_AGAIN", 4)
    made = pipeline(watch="all")
    noting = []
    run = made._watch.run
    made._watch.run = lambda *arguments: (run(*arguments), noting.append(made._watch.is_noting))[0]  # type: ignore[method-assign,func-returns-value]
    train(made, 9)
    per_batch = len(noting) // 9
    forwards = [noting[index * per_batch] for index in range(9)]
    assert forwards == [True, True, False, False, True, False, False, False, True]


def test_a_limit_is_an_error_that_says_where_and_what_to_do() -> None:
    roomy = pipeline()
    train(roomy)
    peak = roomy.ledger.peak.total
    exact = pipeline(limit=peak)
    train(exact, 3)
    with pytest.raises(MemoryLimitError, match=r"rank 0 held [\d,]+ bytes in 0\w+\d, 1 more than its memory limit"):
        train(pipeline(limit=peak - 1))
    with pytest.raises(ConfigError, match="the memory limit has 2 entries for 1 ranks; give one, or one each"):
        pipeline(limit=[1, 2])
    with pytest.raises(ConfigError, match="the memory limit is 0; give bytes above 0"):
        pipeline(limit=0)


class LiveBytes(TorchDispatchMode):
    """Watches every tensor that an operation makes, and knows nothing of stages and schedules."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        known = {item.untyped_storage()._cdata for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)}
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor) and (storage := item.untyped_storage())._cdata not in known:
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def count(self, without: Iterable[Tensor | None]) -> int:
        left_out = {item.untyped_storage()._cdata for item in without if item is not None}
        return sum(size for key, (item, size) in self._storages.items() if not item.expired() and key not in left_out)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "pipedream"])
@pytest.mark.parametrize("policies", [["keep"] * 4, ["recompute"] * 4, ["keep", "recompute", "keep", "recompute"]])
def test_after_every_action_the_ledger_holds_what_is_alive(schedule: str, policies: list[str]) -> None:
    seen: list[tuple[str, int, int]] = []

    def look(action: Any, start: int, end: int) -> None:
        if str(action.kind) in ("F", "B", "I", "W"):
            gradients = made.held[0].weights.gradients()
            seen.append((str(action), live.count([*gradients]), made.ledger.now.by_kind["activations"]))

    made, data = pipeline(schedule, policies=policies, hooks=Hooks(record=look)), [batch()] * 2
    with LiveBytes() as live:
        list(made.train(data))
    # Losses, which lie where the squares were, and the seeds of their backwards, of every microbatch.
    small = (VALUE + 64) * made.programs.num_microbatches
    assert seen
    assert [each for each in seen if not each[2] <= each[1] <= each[2] + small] == []
