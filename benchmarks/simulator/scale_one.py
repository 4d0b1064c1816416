"""Build and simulate one schedule in this process, which imports nothing else, and print the cost as JSON.

python -m benchmarks.simulator.scale_one RANKS MICROBATCHES
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import time

from vpipe.schedule.registry import build_schedule
from vpipe.schedule.simulate.costs import Costs
from vpipe.schedule.simulate.simulate import simulate


def measure_here(num_ranks: int, num_microbatches: int) -> dict[str, float]:
    """Build and simulate 1F1B, with messages that take time."""
    gc.disable()  # as `vpipe schedule` does: there is no garbage among millions of actions
    start = time.process_time()
    schedule = build_schedule("1f1b", num_ranks, num_microbatches)
    built = time.process_time()
    costs = Costs.from_rank_shares(schedule.placement, latency=0.01, bandwidth=100.0, message_bytes=1.0)
    simulation = simulate(schedule, costs)
    done = time.process_time()
    return {
        "num_ranks": num_ranks,
        "num_microbatches": num_microbatches,
        "num_actions": sum(map(len, schedule.orders)),
        "build_seconds": round(built - start, 4),
        "simulate_seconds": round(done - built, 4),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "makespan": simulation.makespan,
    }


if __name__ == "__main__":
    print(json.dumps(measure_here(int(sys.argv[1]), int(sys.argv[2]))))
