"""Evaluations depend on weights, batches and the size of a microbatch alone, and keep to the memory limit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_pipeline import flat_pipeline
from torch import Tensor, nn

from vpipe.errors import ConfigError, DataError, MemoryLimitError
from vpipe.launch.local import launch_local
from vpipe.runtime.batch import Batch
from vpipe.runtime.comm.world import World
from vpipe.runtime.evaluation import LossSums, pieces_alike
from vpipe.runtime.pipeline import Pipeline

WIDTH, ROWS = 16, 4


def build(schedule: str = "gpipe", drawing: nn.Module | None = None, **options: Any) -> Pipeline:
    torch.manual_seed(3)
    blocks: list[nn.Module] = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)]
    return flat_pipeline(
        blocks if drawing is None else [*blocks, drawing],
        nn.functional.mse_loss,
        optimizer=lambda named: torch.optim.SGD(named, lr=0.1),
        schedule=schedule,
        num_microbatches=2,
        **options,
    )


def batch(num_samples: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(num_samples, WIDTH), torch.randn(num_samples, WIDTH)


@pytest.fixture
def _alone() -> Iterator[None]:
    with World.join(timeout_seconds=60, backend="gloo"):
        yield


def forwards(made: Pipeline, num_samples: int, **options: int) -> list[int]:
    """Return how many samples each forward of an evaluation had."""
    seen: list[int] = []
    hook = made.held[0].weights.newest[0].register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    made.evaluate([batch(num_samples)], **options)
    hook.remove()
    return seen


@pytest.mark.usefixtures("_alone")
def test_a_batch_is_cut_from_its_start_with_one_short_last_piece() -> None:
    made = build()
    for before in (None, 2 * ROWS, 8 * ROWS, 2):
        if before is not None:
            made.step(*batch(before))
        assert forwards(made, 6) == [3, 3]  # without a size, into as many as a batch for training
        assert forwards(made, 4 * ROWS + 1) == [2 * ROWS + 1, 2 * ROWS]
        assert forwards(made, 1) == [1]
        assert forwards(made, 4 * ROWS + 1, microbatch_size=ROWS) == [ROWS] * 4 + [1]
        assert forwards(made, 6, microbatch_size=5) == [5, 1]
        assert forwards(made, 3, microbatch_size=5) == [3]


class Drawing(nn.Module):
    """Draws random numbers, in an evaluation, too."""

    def forward(self, value: Tensor) -> Tensor:
        return value * torch.rand_like(value)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "pipedream"])
def test_the_same_weights_and_batches_give_the_same_bits_whatever_came_before(schedule: str) -> None:
    held_out = [batch(5), batch(5, seed=2), batch(4, seed=3), batch(70, seed=4)]

    def evaluate(*before: int, **options: Any) -> tuple[dict[str, float], dict[str, float]]:
        made = build(schedule, learning_rate=lambda iteration: 0.0, drawing=Drawing(), **options)
        for num_samples in before:
            list(made.train([batch(num_samples)] * 2))
            made.evaluate([batch(num_samples)])
        return made.evaluate(held_out), made.evaluate(held_out, microbatch_size=3)

    # A limit changes how many pieces go together, and with it the order in which they are computed.
    found = [evaluate(), *(evaluate(size) for size in (8, 16, 4)), evaluate(8, 2, limit=1 << 30)]
    assert found == [found[0]] * 5


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("schedule", ["gpipe", "pipedream"])
def test_the_loss_is_that_of_whole_batches(schedule: str) -> None:
    made = build(schedule)
    list(made.train([batch(2 * ROWS)] * 2))
    held_out = [batch(64 * ROWS), batch(7, seed=2), batch(2, seed=5)]
    cut, whole = made.evaluate(held_out), made.evaluate(held_out, microbatch_size=64 * ROWS)
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    modules = made.held[0].weights.newest
    with torch.no_grad():
        losses = [nn.functional.mse_loss(nn.Sequential(*modules)(x), y, reduction="sum") for x, y in held_out]
    count = sum(len(x) for x, _ in held_out) * WIDTH
    assert cut["loss"] == pytest.approx(float(sum(losses)) / count, rel=1e-6)


@pytest.mark.usefixtures("_alone")
def test_an_evaluation_of_nothing_is_refused() -> None:
    made = build()
    with pytest.raises(DataError, match="there are no batches to evaluate"):
        made.evaluate([])
    for size in (0, -1):
        with pytest.raises(ConfigError, match=f"microbatch_size is {size}; give a number of samples above 0"):
            made.evaluate([batch(4)], microbatch_size=size)


def test_fractional_counts_add_up_in_any_order() -> None:
    shares = [(0.7, 0.1), (1e6, 0.2), (1e-7, 0.3)]
    found = []
    with World.join() as world:
        for order in (shares, shares[::-1]):
            sums = LossSums(["loss"])
            for loss, count in order:
                sums.take({0: {"loss": torch.tensor(loss, dtype=torch.float64)}}, {0: {"loss": count}})
            found.append(sums.means(0, world))
    losses, counts = zip(*shares, strict=True)
    assert found == [{"loss": math.fsum(losses) / math.fsum(counts)}] * 2


def test_pieces_of_one_shape_go_together() -> None:
    with World.join(timeout_seconds=60, backend="gloo"):
        programs = build().programs
    batches = [Batch({"x": torch.arange(5)}, 5), Batch({"x": torch.arange(5, 10)}, 5)]
    pieces = list(pieces_alike(batches, 2, programs, None))
    assert [[(piece.number, piece.batch.fields["x"].tolist()) for piece in alike] for alike in pieces] == [
        [(0, [0, 1]), (1, [2, 3]), (3, [5, 6]), (4, [7, 8])],
        [(2, [4]), (5, [9])],
    ]
    lengths = [Batch({"x": torch.zeros(4, length)}, 4) for length in (3, 5, 3)]
    assert [[piece.number for piece in alike] for alike in pieces_alike(lengths, 2, programs, None)] == [
        [0, 1, 4, 5],
        [2, 3],
    ]
    many = (Batch({"x": torch.zeros(1, length)}, 1) for length in range(200))
    first = next(pieces_alike(many, 1, programs, None))
    assert [piece.number for piece in first] == [0]
    assert next(many).fields["x"].shape == (1, 128)  # no more than those are held
    # With a limit, no more than the two that GPipe has in flight.
    assert [len(alike) for alike in pieces_alike(batches, 2, programs, 1 << 30)] == [2, 2, 2]


@pytest.mark.usefixtures("_alone")
def test_an_evaluation_is_within_the_limit_of_training() -> None:
    made = build(watch="all")
    made.step(*batch(2 * ROWS))
    limited = build(limit=made.ledger.peak.total)
    for _ in range(3):
        limited.step(*batch(2 * ROWS))
        limited.evaluate([batch(64 * ROWS), batch(3)], ROWS)


@pytest.mark.usefixtures("_alone")
def test_an_evaluation_over_the_limit_is_told() -> None:
    made = build(watch="all")
    made.step(*batch(2 * ROWS))
    limited = build(limit=made.ledger.peak.total)
    limited.step(*batch(2 * ROWS))
    with pytest.raises(
        MemoryLimitError,
        match=r"rank 0 held [\d,]+ bytes in 0F0 of an evaluation, .*\(of Pipeline.evaluate: microbatch_size\)",
    ):
        limited.evaluate([batch(256 * ROWS)])


def evaluate_under_limits(arguments: list[str]) -> None:
    """Train and evaluate under the limit that training alone needs, rank by rank, and some messages more."""
    with World.join(timeout_seconds=60, backend="gloo") as group:
        free = build("1f1b", watch="all")
        for _ in range(3):
            free.step(*batch(2 * ROWS))
        peaks = [torch.zeros(1, dtype=torch.int64) for _ in range(group.num_ranks)]
        torch.distributed.all_gather(peaks, torch.tensor([free.ledger.peak.total]))
        free.close()
        limited = build("1f1b", limit=[int(peak) + 4096 for peak in peaks])
        for _ in range(3):
            limited.step(*batch(2 * ROWS))
            limited.evaluate([batch(64 * ROWS), batch(3), batch(64 * ROWS + 1)], ROWS)
        limited.step(*batch(2 * ROWS))
        (Path(arguments[0]) / f"{group.rank}").write_text(f"{limited.ledger.peak.total} {limited.ledger.limit}")
        torch.distributed.barrier()


def test_ranks_that_are_ahead_keep_to_the_limit_too(tmp_path: Path) -> None:
    command = ["test_evaluation:evaluate_under_limits", str(tmp_path)]
    launch_local(command, 2, run_directory=tmp_path, environment={"PYTHONPATH": str(Path(__file__).parent)})
    for rank in range(2):
        peak, limit = map(int, (tmp_path / str(rank)).read_text().split())
        assert peak <= limit
