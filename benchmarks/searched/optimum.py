"""Compare the search with the proven optimum on small instances: up to 4 ranks and 6 microbatches.

pip install ortools   # not a dependency of VPipe; a venv of its own will do, it needs nothing else but PYTHONPATH=src
python -m benchmarks.searched.optimum [--instances 100] [--seconds-each 5] [--most-seconds 80] [--out FILE]

The optimum is over one stage per rank and two, in a V and in a loop, as the search's. The results file is the state: a
run that is cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.searched.instances import MILLI, Instance, draw
from benchmarks.searched.prove import Proof, prove

from vpipe.schedule.placement import Placement
from vpipe.schedule.search.problem import capacities
from vpipe.schedule.search.search import search

MOST_RANKS, MOST_MICROBATCHES = 4, 6
STEPS = 2 * MILLI  # in a unit of time: a stage's share may be half of a rank's thousandths


def judge(instance: Instance, counts: tuple[int | None, ...], seconds: float) -> dict[str, Any]:
    """Search, and let the solver look for anything shorter in each placement."""
    found = {}
    for count in counts:
        request = instance.request(count)
        result = search(request)
        known = round(result.makespan * STEPS)
        proofs = [_prove(instance, placement, known, seconds) for placement in request.placements]
        best = min([known, *(proof.makespan for proof in proofs if proof.makespan is not None)])
        found["one stage per rank" if count == 1 else "one or two"] = {
            "makespan": known,
            "lower_bound": result.lower_bound * STEPS,
            "best_known": best,
            "proven_bound": min(best, *(proof.bound for proof in proofs)),
            "proven": all(proof.is_proven for proof in proofs),
            "solver_seconds": round(sum(proof.seconds for proof in proofs), 2),
        }
    return found


def _prove(instance: Instance, placement: Placement, known: int, seconds: float) -> Proof:
    costs = instance.request(None).costs(placement)
    shares = zip(costs.forward, costs.input_grad, costs.weight_grad, strict=True)
    times = [(round(f * STEPS), round(i * STEPS), round(w * STEPS)) for f, i, w in shares]
    places = capacities((instance.limit,) * instance.num_ranks, placement.stages_per_rank)
    return prove(placement, instance.num_microbatches, times, places, known, seconds=seconds)


def print_sums(rows: Sequence[dict[str, Any]], kind: str) -> None:
    """Sum one kind of search up."""
    found = [row[kind] for row in rows]
    proven = [each for each in found if each["proven"]]
    worst = max((each["makespan"] / each["best_known"] - 1 for each in proven), default=0.0)
    equal = sum(each["makespan"] == each["best_known"] for each in proven)
    loosest = max((each["makespan"] / each["proven_bound"] - 1 for each in found), default=0.0)
    broken = sum(each["lower_bound"] > each["best_known"] + 1e-6 for each in found)
    bettered = sum(each["makespan"] > each["best_known"] for each in found)
    print(
        f"{kind}: {len(found)} instances, optimum proven for {len(proven)}; of these the search is optimal in {equal}, "
        f"worst {worst:.3%} above; of all, {bettered} where the solver found something shorter, at most {loosest:.1%} "
        f"above what is proven; lower bound above a makespan: {broken}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--seconds-each", type=float, default=5.0)
    parser.add_argument("--most-seconds", type=float, default=80.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "optimum.json")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.most_seconds
    rows: list[dict[str, Any]] = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    while len(rows) < arguments.instances and time.monotonic() < end:
        instance = draw(len(rows), MOST_RANKS, MOST_MICROBATCHES)
        rows.append(instance.facts() | judge(instance, (1, None), arguments.seconds_each))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    for kind in ("one stage per rank", "one or two"):
        print_sums(rows, kind)


if __name__ == "__main__":
    main()
