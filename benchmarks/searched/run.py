"""Search 1,000 random instances and compare with every hand-made family that fits, built and timed here.

python -m benchmarks.searched.run [--instances 1000] [--most-seconds 80] [--out FILE]

The results file is the state: a run that is cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import environment, format_table
from benchmarks.searched.instances import Instance, draw

from vpipe.errors import ScheduleError
from vpipe.schedule.memory import peak_activations
from vpipe.schedule.proof.validate import check_schedule
from vpipe.schedule.registry import SCHEDULES, build_schedule
from vpipe.schedule.search.search import search
from vpipe.schedule.simulate.simulate import simulate

MOST_RANKS, MOST_MICROBATCHES = 8, 16
KINDS: dict[str, tuple[int, ...]] = {"one stage per rank": (1,), "one or two": (1, 2)}


def best_family(instance: Instance, counts: Sequence[int]) -> tuple[str, float]:
    """Return the best synchronous family within the limit, tried with each number of stages per rank."""
    found = []
    for name, entry in SCHEDULES.items():
        if not entry.synchronous or name == "searched":
            continue
        for count in counts:
            try:
                schedule = build_schedule(name, instance.num_ranks, instance.num_microbatches, stages_per_rank=count)
            except ScheduleError:
                continue
            if max(peak_activations(schedule)) <= instance.limit:
                costs = instance.request(count).costs(schedule.placement)
                found.append((simulate(schedule, costs).makespan, name))
    makespan, name = min(found)
    return name, makespan


def compare(instance: Instance, counts: Sequence[int]) -> dict[str, Any]:
    """Search and judge the schedule that comes back by the validator, the simulator and the families."""
    name, family_makespan = best_family(instance, counts)
    request = instance.request(counts[0] if len(counts) == 1 else None)
    start = time.perf_counter()
    result = search(request)
    seconds = time.perf_counter() - start
    schedule = result.schedule
    makespan = simulate(schedule, request.costs(schedule.placement)).makespan
    return {
        "makespan": makespan,
        "lower_bound": result.lower_bound,
        "best_family": name,
        "best_family_makespan": family_makespan,
        "legal": not check_schedule(schedule),
        "within_limit": max(peak_activations(schedule)) <= instance.limit,
        "stages_per_rank": schedule.placement.stages_per_rank,
        "style": schedule.placement.style,
        "seconds": round(seconds, 3),
    }


def measure_large() -> dict[str, Any]:
    """Time the search of 32 ranks and 128 microbatches."""
    spread = [1 + ((7 * rank) % 32 - 15.5) / 31 for rank in range(32)]  # within 50 %, in no order
    times = [tuple(spread[(rank + 5 * index) % 32] for rank in range(32)) for index in range(3)]
    large = Instance(-1, 32, 128, 32.0, *times)
    start = time.perf_counter()
    result = search(large.request(None))
    return {"seconds": round(time.perf_counter() - start, 2), "gap": result.gap, "best_family": result.best_family}


def table(rows: Sequence[dict[str, Any]], kind: str) -> list[object]:
    """Sum one kind of search up."""
    found = [row[kind] for row in rows]
    gaps = [each["makespan"] / each["lower_bound"] - 1 for each in found]
    won = [each["best_family_makespan"] / each["makespan"] - 1 for each in found]
    return [
        kind,
        len(found),
        sum(each["makespan"] > each["best_family_makespan"] * (1 + 1e-12) for each in found),
        sum(not each["legal"] or not each["within_limit"] for each in found),
        f"{sum(gain > 1e-6 for gain in won)}",
        f"{statistics.median(won):.1%}",
        f"{sum(gap < 1e-6 for gap in gaps)}",
        f"{statistics.mean(gaps):.2%}, {max(gaps):.1%}",
        f"{statistics.median(each['seconds'] for each in found):.2f}, {max(each['seconds'] for each in found):.2f}",
    ]


HEADER = (
    *("stages", "instances", "worse than a family", "illegal or over the limit", "better than all families"),
    *("shorter, median", "at the lower bound", "gap: mean, worst", "seconds: median, worst"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=1000)
    parser.add_argument("--most-seconds", type=float, default=80.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "families.json")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.most_seconds
    results: dict[str, Any] = (
        json.loads(arguments.out.read_text())
        if arguments.out.exists()
        else {"environment": environment(), "large": measure_large(), "instances": []}
    )
    rows = results["instances"]
    while len(rows) < arguments.instances and time.monotonic() < end:
        instance = draw(len(rows), MOST_RANKS, MOST_MICROBATCHES)
        rows.append(instance.facts() | {kind: compare(instance, counts) for kind, counts in KINDS.items()})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({key: value for key, value in results.items() if key != "instances"})
    arguments.out.write_text(f'{head[:-1]}, "instances": [\n{lines}\n]}}\n')
    print(format_table(HEADER, [table(rows, kind) for kind in KINDS]))
    print("best families:", dict(Counter(row["one or two"]["best_family"] for row in rows).most_common()))
    print("32 ranks, 128 microbatches:", results["large"])


if __name__ == "__main__":
    main()
