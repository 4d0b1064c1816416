"""Run all contestants in turn on emulated devices and report how close each comes to the ideal.

python -m benchmarks.runtime_overhead.run [--num-rounds 5] [--contestants NAME...] [--out FILE]
"""

from __future__ import annotations

from dataclasses import dataclass
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
from benchmarks.runtime_overhead.emulated import BOUNDARY_FLOATS, NUM_RANKS

HERE = "benchmarks.runtime_overhead"
BASELINE = "torch 1F1B"
BOUND = "blocks alone"
ONE_UPDATE = "vpipe asynchronous, 1 update"
"""Per batch, as torch's 1F1B has, instead of one per microbatch."""
CONTESTANTS = (
    Contestant(BASELINE, f"{HERE}.peer_torch", num_ranks=NUM_RANKS),
    Contestant("vpipe 1F1B", f"{HERE}.vpipe_emulated", ("--schedule", "1f1b"), num_ranks=NUM_RANKS),
    Contestant("vpipe asynchronous", f"{HERE}.vpipe_emulated", ("--schedule", "pipedream"), num_ranks=NUM_RANKS),
    Contestant(ONE_UPDATE, f"{HERE}.vpipe_emulated", ("--schedule", "pipedream", "--macrobatch"), num_ranks=NUM_RANKS),
    Contestant(BOUND, f"{HERE}.blocks_alone", num_ranks=NUM_RANKS),
)
WITHOUT_BUBBLE = {"vpipe asynchronous", ONE_UPDATE, BOUND}


@dataclass(frozen=True)
class Case:
    """One setting: times per microbatch and stage, and how many batches make a measurement."""

    forward_ms: float
    backward_ms: float
    num_microbatches: int
    num_batches: int

    def bound_ms(self, *, bubble: bool) -> float:
        """Return the closed form for one batch without any overhead: no bubble, or that of 1F1B."""
        slots = self.num_microbatches + (NUM_RANKS - 1 if bubble else 0)
        return slots * (self.forward_ms + self.backward_ms)


CASES = (Case(10, 20, 8, 20), Case(10, 20, 32, 8), Case(1, 2, 8, 100))


def compare(case: Case, contestants: list[Contestant], num_rounds: int) -> list[dict[str, Any]]:
    """Measure one case and return a result per contestant."""
    reports = measure_in_turn(contestants, vars(case), num_rounds)
    medians = {name: [median_ms(report) for report in rounds] for name, rounds in reports.items()}
    ideal_ms = case.bound_ms(bubble=False)
    results = []
    for name, batch_ms in medians.items():
        bound_ms = case.bound_ms(bubble=name not in WITHOUT_BUBBLE)
        share = spread([ideal_ms / value for value in batch_ms])
        # The actions on the critical path are the forwards and backwards that the closed form counts.
        num_actions = 2 * bound_ms / (case.forward_ms + case.backward_ms)
        result = {
            "name": name,
            "batch_ms": spread(batch_ms),
            "share_of_ideal": share,
            "closed_form_share": round(ideal_ms / bound_ms, 4),
            "overhead_per_action_ms": round((spread(batch_ms)["median"] - bound_ms) / num_actions, 3),
        }
        if BOUND in medians:
            result["share_of_bound"] = speed_over(medians[BOUND], batch_ms)
        if BASELINE in medians:
            result["speed_over_baseline"] = speed_over(medians[BASELINE], batch_ms)
        results.append(result)
    return results


def row(case: Case, result: dict[str, Any]) -> list[str]:
    """Return one line of the table."""
    share, of_bound, speed = result["share_of_ideal"], result.get("share_of_bound"), result.get("speed_over_baseline")
    return [
        f"{case.forward_ms:g}, {case.backward_ms:g}",
        str(case.num_microbatches),
        result["name"],
        f"{result['batch_ms']['median']:.1f}",
        f"{share['median']:.3f} ({share['min']:.3f} to {share['max']:.3f})",
        f"{of_bound['median']:.3f}" if of_bound else "",
        f"{result['closed_form_share']:.3f}",
        f"{result['overhead_per_action_ms']:.2f}",
        f"{speed['median']:.2f}" if speed else "",
    ]


def main() -> None:
    default_out = Path(__file__).parent / "results" / "runtime_overhead.json"
    contestants, num_rounds, out = parse_run(__doc__, CONTESTANTS, default_out)
    surroundings = environment()
    cases, rows = [], []
    for case in CASES:
        print(f"F={case.forward_ms:g} ms, B={case.backward_ms:g} ms, {case.num_microbatches} microbatches")
        results = compare(case, contestants, num_rounds)
        cases.append({**vars(case), "num_ranks": NUM_RANKS, "boundary_bytes": 4 * BOUNDARY_FLOATS, "results": results})
        rows += [row(case, result) for result in results]
    write_results(out, {"baseline": BASELINE, "environment": surroundings, "cases": cases})
    header = ["F, B [ms]", "m", "contestant", "batch [ms]", "share of ideal", f"of {BOUND}", "closed form"]
    print(format_table([*header, "overhead/action [ms]", f"speed / {BASELINE}"], rows))


if __name__ == "__main__":
    main()
