"""Measure what splitting a backward costs: the times of I and W beside that of B, and what is held in between.

python -m benchmarks.families.split [--num-rounds 15] [--out FILE]

One rank, one thread, one microbatch at a time through one block, in VPipe's own runtime: a pipeline with full backwards
and one whose order is F, I, W, batch by batch in turn. The same blocks, weights, batches and random numbers.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import environment, format_table, spread, write_results
from benchmarks.families.blocks import bert_blocks, torch_block
from benchmarks.families.live_bytes import LiveBytes
from benchmarks.simulator.devices import EmulatedDevice, StageTimes
from torch import Tensor, nn

from vpipe.plan.plan import Plan
from vpipe.runtime.hooks import Hooks
from vpipe.runtime.pipeline import Pipeline
from vpipe.schedule.action import Action, Kind

NUM_MICROBATCHES, NUM_WARMUP_BATCHES = 2, 2
MICROBATCH_SIZE, NUM_TOKENS = 4, 128
TARGET = 1.05


BLOCKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "BERT base, width 768": (768, lambda: bert_blocks(1, 768)[0]),
    "BERT, width 256": (256, lambda: bert_blocks(1, 256)[0]),
    "nn.TransformerEncoderLayer, width 768": (768, lambda: torch_block(768)),
}


class _Trial:
    """One pipeline of one rank, and what its actions took and left."""

    def __init__(self, block: nn.Module, hidden_size: int, schedule: str) -> None:
        # The block comes second, so that its input needs a gradient as in the middle of a model.
        first = EmulatedDevice(StageTimes(0.0, 0.0, 0.0))
        self.times_ms: dict[Kind, list[float]] = defaultdict(list)
        self.held_bytes: dict[Kind, int] = {}
        self._live = LiveBytes()
        self._is_counting = False
        self._pipeline = Pipeline(
            [first, block],
            nn.functional.mse_loss,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-6),
            plan=Plan(schedule, num_microbatches=NUM_MICROBATCHES),
            hooks=Hooks(record=self._record),
        )
        shape = (NUM_MICROBATCHES * MICROBATCH_SIZE, NUM_TOKENS, hidden_size)
        self._batch = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def _record(self, action: Action, start_ns: int, end_ns: int) -> None:
        self.times_ms[action.kind].append((end_ns - start_ns) / 1e6)
        if self._is_counting and action.microbatch == NUM_MICROBATCHES - 1:
            held = self._pipeline.held.values()
            gradients: list[Tensor | None] = [item.grad for stage in held for item in stage.weights.parameters]
            self.held_bytes[action.kind] = self._live.count(without=gradients)

    def step(self) -> dict[Kind, float]:
        """Train one batch; return the time of each kind, per microbatch."""
        self.times_ms.clear()
        self._pipeline.step(self._batch, self._batch)
        return {kind: statistics.fmean(times) for kind, times in self.times_ms.items()}

    def count(self) -> dict[Kind, int]:
        """Train one batch; return what is held after each action of its last microbatch."""
        self._is_counting = True
        with self._live:
            self.step()
        self._is_counting = False
        return self.held_bytes

    def __enter__(self) -> _Trial:
        return self

    def __exit__(self, *error: object) -> None:
        self._pipeline.close()


def compare(name: str, num_rounds: int, folder: Path) -> dict[str, Any]:
    """Measure one block."""
    hidden_size, build = BLOCKS[name]
    orders = {kinds: folder / f"{kinds}.csv" for kinds in ("FB", "FIW")}
    for kinds, path in orders.items():
        path.write_text(",".join(f"0{kind}{index}" for index in range(NUM_MICROBATCHES) for kind in kinds) + "\n")
    # Both leave the one-rank group of the first.
    with (
        _Trial(build(), hidden_size, str(orders["FB"])) as whole,
        _Trial(build(), hidden_size, str(orders["FIW"])) as split,
    ):
        for _ in range(NUM_WARMUP_BATCHES):
            whole.step(), split.step()
        rounds = [(whole.step(), split.step()) for _ in range(num_rounds)]
        held = split.count()
    halves = [own[Kind.I] + own[Kind.W] for _, own in rounds]
    return {
        "forward_ms": spread([full[Kind.F] for full, _ in rounds]),
        "split_forward_ms": spread([own[Kind.F] for _, own in rounds]),
        "backward_ms": spread([full[Kind.B] for full, _ in rounds]),
        "input_grad_ms": spread([own[Kind.I] for _, own in rounds]),
        "weight_grad_ms": spread([own[Kind.W] for _, own in rounds]),
        "halves_over_whole": spread([both / full[Kind.B] for both, (full, _) in zip(halves, rounds, strict=True)]),
        "held_bytes": {kind.value: held[kind] for kind in (Kind.F, Kind.I, Kind.W)},
    }


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    rows = []
    for name, row in results.items():
        ratio, held = row["halves_over_whole"], row["held_bytes"]
        rows.append(
            [
                name,
                *(f"{row[key]['median']:.1f}" for key in ("backward_ms", "input_grad_ms", "weight_grad_ms")),
                f"{ratio['median']:.3f}",
                "yes" if ratio["median"] <= TARGET else "no",
                *(f"{held[kind] / 2**20:.1f}" for kind in "FIW"),
            ]
        )
    header = ["block", "B [ms]", "I", "W", "(I + W) / B", f"<= {TARGET}", "held after F [MiB]", "after I", "after W"]
    print(format_table(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "split.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    surroundings = environment()
    with tempfile.TemporaryDirectory() as folder:
        results = {name: compare(name, arguments.num_rounds, Path(folder)) for name in BLOCKS}
    write_results(arguments.out, {"environment": surroundings, "blocks": results})
    show(results)


if __name__ == "__main__":
    main()
