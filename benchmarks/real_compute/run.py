"""Run all contestants in turn on real transformer blocks, two ranks on two cores.

python -m benchmarks.real_compute.run [--num-rounds 5] [--contestants NAME...] [--out FILE]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import (
    Contestant,
    environment,
    format_table,
    measure_in_turn,
    median_ms,
    parse_run,
    speed_over,
    spread,
    write_results,
)
from benchmarks.real_compute.blocks import BATCH_SIZE, HIDDEN_SIZE, NUM_BLOCKS, NUM_TOKENS

HERE = "benchmarks.real_compute"
BASELINE = "torch 1F1B"
NUM_RANKS = 2
CONTESTANTS = (
    Contestant(BASELINE, f"{HERE}.peer_torch", num_ranks=NUM_RANKS),
    Contestant("vpipe 1F1B", f"{HERE}.vpipe_real", ("--schedule", "1f1b"), num_ranks=NUM_RANKS),
    Contestant("vpipe asynchronous", f"{HERE}.vpipe_real", ("--schedule", "pipedream"), num_ranks=NUM_RANKS),
    Contestant("one process, 1 thread", f"{HERE}.peer_single", ("--num-threads", "1")),
    Contestant("one process, 2 threads", f"{HERE}.peer_single", ("--num-threads", "2"), threads_per_rank=2),
)
MICROBATCHES = (8, 4)


def compare(num_microbatches: int, contestants: list[Contestant], num_rounds: int) -> list[dict[str, Any]]:
    """Measure one number of microbatches and return a result per contestant."""
    reports = measure_in_turn(contestants, {"num_microbatches": num_microbatches}, num_rounds)
    medians = {name: [median_ms(report) for report in rounds] for name, rounds in reports.items()}
    results = []
    for name, batch_ms in medians.items():
        result: dict[str, Any] = {"name": name, "final_loss": reports[name][0]["loss"], "batch_ms": spread(batch_ms)}
        result["samples_per_second"] = spread([BATCH_SIZE / value * 1e3 for value in batch_ms])
        if BASELINE in medians:
            result["speed_over_baseline"] = speed_over(medians[BASELINE], batch_ms)
        results.append(result)
    return results


def row(num_microbatches: int, result: dict[str, Any]) -> list[str]:
    """Return one line of the table."""
    speed = result.get("speed_over_baseline")
    return [
        str(num_microbatches),
        result["name"],
        f"{result['batch_ms']['median']:.0f}",
        f"{result['samples_per_second']['median']:.2f}",
        f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})" if speed else "",
        f"{result['final_loss']:.6f}",
    ]


def main() -> None:
    default_out = Path(__file__).parent / "results" / "real_compute.json"
    contestants, num_rounds, out = parse_run(__doc__, CONTESTANTS, default_out)
    model = {"num_blocks": NUM_BLOCKS, "hidden_size": HIDDEN_SIZE, "num_tokens": NUM_TOKENS, "batch_size": BATCH_SIZE}
    surroundings = environment()
    cases, rows = [], []
    for num_microbatches in MICROBATCHES:
        print(f"{num_microbatches} microbatches")
        results = compare(num_microbatches, contestants, num_rounds)
        cases.append({"num_microbatches": num_microbatches, "num_ranks": NUM_RANKS, "results": results})
        rows += [row(num_microbatches, result) for result in results]
    write_results(out, {"baseline": BASELINE, "environment": surroundings, "model": model, "cases": cases})
    header = ["m", "contestant", "batch [ms]", "samples/s", f"speed / {BASELINE}", "loss"]
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
