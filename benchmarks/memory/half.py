"""Train under half of the memory that a plan without policies needs, and compare: loss bits, bytes, time.

Once with whatever the planner chooses, once by recomputation alone.

python -m benchmarks.memory.half [--model bert] [--microbatches 10] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

from benchmarks.common import environment, format_table, write_results
from benchmarks.memory.configurations import base_config
from benchmarks.memory.ranks import measure_profile, run_config

from vpipe.config import build_config
from vpipe.config.planned import build_request, with_plan
from vpipe.plan.memory import Policy
from vpipe.plan.search import find_plan, judge_partition
from vpipe.plan.units import format_bytes

NUM_RANKS, NUM_BATCHES = 2, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert", choices=["bert", "gpt"])
    parser.add_argument("--microbatches", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "half.json")
    arguments = parser.parse_args()
    surroundings = environment()
    tree = base_config(arguments.model, arguments.microbatches)
    tree["pipeline"] |= {"schedule": "gpipe", "num_ranks": NUM_RANKS}
    tree["train"]["iterations"] = NUM_BATCHES
    free = build_config(tree)
    profile = measure_profile(free)
    cut = [len(profile.sizes[0].blocks) // 2, len(profile.sizes[0].blocks) - len(profile.sizes[0].blocks) // 2]
    keep = judge_partition(build_request(free, profile), cut, [Policy.KEEP] * sum(cut))
    limit = max(memory.total for memory in keep.memory) // 2
    limited = build_config({**tree, "plan": {"partition": "auto", "memory_limit": limit}})
    request = build_request(limited, profile)
    plan = find_plan(request).best
    recomputing = find_plan(replace(request, policies=(Policy.KEEP, Policy.RECOMPUTE))).best
    rows, results = [], []
    for name, config, predicted in (
        ("all kept", with_plan(free, keep), keep),
        ("half of it", with_plan(limited, plan), plan),
        ("half, recomputing", with_plan(limited, recomputing), recomputing),
    ):
        runs = run_config(config)
        result = {
            "name": name,
            "partition": list(predicted.partition),
            "policies": [policy.value for policy in predicted.policies],
            "predicted_bytes": max(memory.total for memory in predicted.memory),
            "measured_bytes": max(run.peak_bytes for run in runs),
            "predicted_ms": round(predicted.step_ms, 1),
            # The first batches are looked at closely, which takes time.
            "measured_ms": round(statistics.median(runs[0].batch_ms[3:]), 1),
            "bytes_moved": sum(run.bytes_moved for run in runs),
            "losses": list(runs[0].losses),
        }
        results.append(result)
        sizes = [format_bytes(float(str(result[key]))) for key in ("predicted_bytes", "measured_bytes")]
        rows.append([name, *sizes, result["predicted_ms"], result["measured_ms"]])
    same = all(result["losses"] == results[0]["losses"] for result in results)
    print(format_table(["run", "predicted", "measured", "predicted ms", "measured ms"], rows))
    for result in results[1:]:
        print(f"{result['name']}: {result['partition']} {' '.join(result['policies'])}")
    print(f"limit {format_bytes(limit)}; the same bits in every loss: {same}")
    write_results(arguments.out, {"environment": surroundings, "limit": limit, "same_losses": same, "runs": results})


if __name__ == "__main__":
    main()
